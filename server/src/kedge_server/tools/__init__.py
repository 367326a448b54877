"""The offline tools: they read a data directory that no server holds, and change nothing in it."""
