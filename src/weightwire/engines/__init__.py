"""Running inference engines, as a trainer sees them. One file or folder for each kind."""
