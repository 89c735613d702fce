"""Features of pictures by what no run trains: pixels, patches, a backbone of given weights."""
