"""Pixels on the CPU: decode, preprocess and its inverse, masks, drawing."""
