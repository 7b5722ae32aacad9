"""One folder, any number of processes: who does which chunk, and when it is finished."""
