"""Decisions and arithmetic, pure: no I/O, no threads, no clock. Time comes in as an argument."""
