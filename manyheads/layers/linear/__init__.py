"""Linear: layers around a state, a long convolution or a scan."""
