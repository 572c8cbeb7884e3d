"""Where buckets arrive: in their places, in memory that is used again, or partly so."""

import torch

from weightwire.landing import BUFFERS, Landing, room_for
from weightwire.updates.buckets import Bucket, Piece

LARGE = 4 << 20
CPU = torch.device("cpu")


def bucket_of(index: int, *tensors: int) -> Bucket:
    pieces = tuple(Piece(tensor, 0, LARGE, at * LARGE, torch.uint8) for at, tensor in enumerate(tensors))
    return Bucket(index, len(tensors) * LARGE, pieces)


def test_pieces_come_to_their_places_and_others_beside() -> None:
    bucket, own = bucket_of(0, 0, 1), torch.zeros(LARGE, dtype=torch.uint8)
    landed = Landing([bucket], lambda _: [None, own], CPU).of(bucket)
    assert landed.whole is None
    assert not landed.stays
    assert landed.parts[1] is own
    assert landed.parts[0].numel() == LARGE


def test_without_a_buffer_where_all_have_places() -> None:
    bucket, own = bucket_of(0, 0, 1), torch.zeros(2, LARGE, dtype=torch.uint8)
    landing = Landing([bucket], lambda _: [*own], CPU)
    landed = landing.of(bucket)
    assert landed.stays
    assert [part.data_ptr() for part in landed.parts] == [row.data_ptr() for row in own]
    assert landing._buffers == {}


def test_a_bucket_without_places_is_one_piece_of_memory_that_the_third_after_it_gets_too() -> None:
    buckets = [bucket_of(index, index) for index in range(BUFFERS + 1)]
    landing = Landing(buckets, lambda bucket: [None], CPU)
    found = [landing.of(bucket) for bucket in buckets]
    places = [landed.whole.data_ptr() for landed in found if landed.whole is not None]
    assert len(places) == BUFFERS + 1
    assert (len(set(places)), places[0]) == (BUFFERS, places[-1])
    assert [landed.parts[0].data_ptr() for landed in found] == places
    assert room_for(buckets) == BUFFERS * LARGE


def test_many_small_pieces_come_together_whatever_places_they_have() -> None:
    pieces = tuple(Piece(number, 0, 2, 64 * number, torch.float32) for number in range(3))
    bucket, own = Bucket(0, 136, pieces), torch.zeros(2)
    landed = Landing([bucket], lambda _: [own] * 3, CPU).of(bucket)
    assert landed.whole is not None
    assert landed.whole.numel() == 136
    landed.parts[2].fill_(1)
    assert landed.whole.view(torch.float32)[32:].tolist() == [1, 1]
