"""Steps of the lower optimizer as functions that can be differentiated."""
