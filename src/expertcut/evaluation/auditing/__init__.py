"""Which criterion foretells what removing an expert does: told by removing some, one by one."""
