"""One algorithm per file: argument checks, dispatch to a kernel module, and what is saved."""
