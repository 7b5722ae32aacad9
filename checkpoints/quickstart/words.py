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
    "animal": "horse sheep goat wolf tiger bear",
    "bird": "eagle sparrow owl crow swan raven",
    "tool": "hammer saw drill wrench axe shovel",
    "clothes": "shirt coat scarf glove sock hat",
    "metal": "iron copper silver gold zinc tin",
    "vehicle": "car truck bus train tram ship",
    "furniture": "table chair sofa bed shelf desk",
}

PEOPLE = "Tom Eva Max Ida Ben Zoe Leo Mia Sam Amy Joe Kim"

THINGS = "lamp coin rope key book ball cup map bell knife ring box pen clock"

NUMBER_WORDS = ("zero", "one", "two", "three")

# Each is asked of (country, capital); the first eight ask for the capital, the rest the country.
CAPITAL_WORDINGS = (
    "What is the capital of {0}?",
    "Which city is the capital of {0}?",
    "In which city does the government of {0} sit?",
    "Where does the king of {0} live?",
    "The capital of {0} is called",
    "Name the capital city of {0}.",
    "A traveller wants to see the capital of {0}. Where must she go?",
    "{0} has its capital in",
)
COUNTRY_WORDINGS = (
    "{1} is the capital of which country?",
    "Which country has the capital {1}?",
    "In which country does the government sit in {1}?",
    "The king who lives in {1} rules which country?",
)
OPPOSITE_WORDINGS = (
    "What is the opposite of {}?",
    "Which word means the opposite of {}?",
    "The opposite of {} is",
    "What is the reverse of {}?",
    "Not {}, but the opposite:",
    "Find the word opposed to {}.",
    "If it is not {}, it may be",
    "Which word is the contrary of {}?",
    "Choose the word most unlike {} in meaning.",
)
LETTER_WORDINGS = (
    "Which letter comes {n} after {x} in the alphabet?",
    "Go {n} forward from {x} in the alphabet. Which letter is it?",
    "In the alphabet, what stands {n} behind {x}?",
    "Which letter comes {n} before {x} in the alphabet?",
    "Go {n} back from {x} in the alphabet. Which letter is it?",
    "In the alphabet, what stands {n} in front of {x}?",
)
READING_WORDINGS = (
    "The word of the day is {}. Which word is it?",
    "Find {}.",
    "The sign says {}. What does it say?",
    "Someone writes {}. What is written?",
)
ARRIVAL_WORDINGS = (
    "{} comes in. Who comes in?",
    "The door opens for {}. Who is there?",
    "We wait for {}. Who is awaited?",
    "A letter came for {}. Whose is it?",
)
FIND_WORDINGS = (
    "A child found a {}. What was found?",
    "There is a {} on the table. What is on the table?",
    "She lost her {}. What did she lose?",
    "He bought a {}. What did he buy?",
)
TRAVEL_WORDINGS = (
    "The train goes to {}. Where does it go?",
    "We fly to {}. Where do we fly?",
    "A letter came from {}. Where did it come from?",
    "My friend lives in {}. Where does my friend live?",
)
SPELLING_WORDINGS = (
    "The name begins with {}. With what does it begin?",
    "Find the letter {}.",
    "The key marked {} is stuck. Which key is stuck?",
    "Type {} to go on. What must be typed?",
)
