"""Packing helpers, under AutoAWQ's module names."""
