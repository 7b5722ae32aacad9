"""Does a way of reweighting help on questions that it was not chosen on?"""
