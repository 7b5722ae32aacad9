"""What every cut of a grid would answer, without writing one."""
