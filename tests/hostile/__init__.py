"""What strangers send: files made to break a reader, each refused in one line that names it."""
