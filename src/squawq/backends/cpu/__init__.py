"""CPU backend: the C++ library of csrc/ through ctypes."""
