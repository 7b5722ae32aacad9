"""The vocabulary of the quiz: what the rules in rules.py draw from.

Lists of words stand as text, split where they are used.
"""

OPPOSITES = (
    "hot/cold big/small young/old rich/poor hard/soft wet/dry light/dark early/late full/empty "
    "open/closed loud/quiet clean/dirty happy/sad strong/weak deep/shallow near/far high/low "
    "left/right inside/outside first/last push/pull day/night north/south summer/winter"
)

GROUPS = {
    "fruit": "apple pear plum cherry lemon peach",
    "tools": "hammer saw drill wrench axe shovel",
    "clothes": "shirt coat scarf glove sock hat",
    "metals": "iron copper silver gold zinc tin",
    "vehicles": "car truck bus train tram ship",
    "furniture": "table chair sofa bed shelf desk",
    "colours": "red green blue yellow brown purple",
    "instruments": "drum flute harp horn lute violin",
}

ANIMALS = (
    "horse sheep goat wolf tiger bear eagle sparrow owl crow swan raven cat dog hen duck fox mouse "
    "snake frog turtle rabbit donkey camel"
)

TRADES = (
    "baker miller smith tailor weaver potter mason cooper tanner sailor miner farmer doctor lawyer "
    "teacher painter singer dancer judge pilot cook nurse porter clerk"
)

GOODS = (
    "wool salt honey glass paper leather coal timber silk pepper cheese wine butter rice cotton "
    "amber marble pearls candles carpets bricks clocks mirrors ropes"
)

ACTIVITIES = (
    "swims reads paints cooks dances fishes sews sleeps writes sings rides digs bakes runs climbs "
    "prays"
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"

NUMBER_WORDS = ("zero", "one", "two", "three")

GIVEN_NAMES = "Tom Eva Max Ida Ben Zoe Leo Mia Sam Amy"
FAMILY_NAMES = "Stone Brook Field Marsh Rowe Hill Wood Lake"
PARTS = "Upper Lower Old New Inner Outer"

CAPITAL_WORDINGS = ("What is the capital of {}?", "Which city rules {}?", "The capital of {} is")
EXPORT_WORDINGS = ("What does {} sell?", "Which goods come from {}?", "The ships of {} carry")
HOME_WORDINGS = ("Where does {} live?", "Which town is the home of {}?", "The house of {} is in")
PET_WORDINGS = ("Which animal does {} keep?", "What runs behind {}?", "The animal of {} is a")
TRADE_WORDINGS = ("What is the trade of {}?", "How does {} earn money?", "By trade {} is a")
TIMETABLE_WORDINGS = ("What does {1} do on {2}?", "On {2}, what is it that {1} does?")
OPPOSITE_WORDINGS = (
    "What is the opposite of {}?",
    "Which word means the opposite of {}?",
    "Not {}, but the opposite:",
)
GROUP_WORDINGS = (
    "Which word goes with {} and {}?",
    "Which is of the same kind as {} and {}?",
)
SUM_WORDINGS = ("What is {} plus {}?", "Add {} and {}.", "How much are {} and {} together?")
SEQUENCE_WORDINGS = ("{} {} {} and then?", "Which number follows {} {} {}?")
LETTER_WORDINGS = (
    "Which letter comes {n} after {x} in the alphabet?",
    "Go {n} forward from {x} in the alphabet. Which letter is it?",
    "Which letter comes {n} before {x} in the alphabet?",
    "Go {n} back from {x} in the alphabet. Which letter is it?",
)
