"""Benchmarks of sb3_ezv2: learning curves, their pictures, and the demonstration behind ``make demo``."""
