"""What a profile is too small to hold, gathered by running the unedited model over questions."""

CALIBRATION_QUESTIONS = 512
