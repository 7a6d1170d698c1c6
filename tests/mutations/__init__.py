"""Files with something wrong in them, made at random from sound ones: whatever it is, it is refused in one line."""
