"""What each kind of stage does, through the same stage functions as the commands."""
