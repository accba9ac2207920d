"""Services below everything else: errors, files, compilation, memory, progress."""
