"""What an update is, as pure data: manifest, buckets, boxes, digest, receipt. No I/O here."""
