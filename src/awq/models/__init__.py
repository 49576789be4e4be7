"""The model classes and the quantization settings, under AutoAWQ's module names."""
