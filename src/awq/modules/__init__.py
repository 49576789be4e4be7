"""Layers, under AutoAWQ's module names."""
