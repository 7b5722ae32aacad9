"""How far a profile's numbers can be trusted; design §8.

Shape suffixes beyond those of `moe`: X experts of all blocks together, in order; S subjects;
B permutations.
"""
