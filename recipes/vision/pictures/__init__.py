"""What images are read from: memory, files, parts of larger files, somebody's Dataset."""
