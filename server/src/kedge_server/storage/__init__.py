"""What outlives the server's process: journals, checkpoints, and the directory that holds them.

Everything here is synchronous and belongs to one thread at a time; who waits for a disk, and in which thread, is
decided above. The engine does not know this package.
"""
