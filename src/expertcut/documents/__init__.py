"""Files that strangers may have written: read within bounds, checked, or refused in one line."""
