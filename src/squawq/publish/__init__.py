"""Publishes a quantized folder: the model card, usage code for every engine, the upload to the Hub."""
