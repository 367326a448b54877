"""What the server says of itself. May be used by every layer but `core`."""
