"""The frozen base: where it comes from, how and where it computes."""
