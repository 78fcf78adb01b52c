"""The words that tasks are made of. Keys, values and fillers are disjoint, so that an answer can
only be retrieved.
"""

KEYS = tuple(
    """
    anchor apple arrow badge bagel banjo barrel basket beacon bell bench bottle box branch bread
    brick bridge broom brush bucket butter button cabin cable camel camera candle canoe canvas
    carpet castle chain chair cherry clock cloud coat coin comet compass copper cotton cradle
    crown curtain daisy desk diamond dolphin drum eagle engine falcon feather fence ferry flag
    flute forest fork fountain fox garden gate ginger glove goat guitar hammer harbor hat hawk
    helmet honey horse island ivory jacket jar jewel kettle kite knife ladder lamp lantern lemon
    lion magnet mango maple marble mirror monkey needle onion orange otter oyster paddle panda
    parrot pearl pencil pepper piano pillow planet plum pony potato pumpkin rabbit ribbon river
    rocket saddle salmon scarf shell
    """.split()
)
VALUES = tuple(
    """
    amber angry ancient bitter blunt bold brave brief bright broad broken calm careful cheap
    clean clever cold cool crisp cruel curly damp dark deep dense direct dry dull eager early
    easy empty exact faint fair famous fancy fast fierce firm flat fond formal frank fresh
    gentle giant glad golden grand gray great green happy harsh heavy hollow honest humble icy
    idle keen kind large late lazy light lively local lonely loud lovely loyal lucky mad mild
    modest muddy narrow neat noble noisy odd old pale plain polite proud pure quick quiet rapid
    rare raw ready red rich rigid ripe rough round royal rude rusty sad safe salty scarce secret
    shallow sharp shiny short shy silent silver simple slim slow smart
    """.split()
)
FILLERS = tuple(
    """
    about above across after again along among around away before behind below beside beyond
    come down during each ever every far few find follow for from give going hear here hold how
    into just keep know leave less like look many may more most move much near never next now
    off often once only open other out over past people place read rest right same see seem side
    since some soon stand start stay still such take tell than that them then there these they
    thing think this those through time today toward turn under until upon very walk way week
    well when where which while will with without work world would year yesterday
    """.split()
)
# RULER's noise, one sentence after the other.
NOISE = (
    "The grass is soft.",
    "The sky is blue.",
    "The sun is warm.",
    "Here we go.",
    "There and back again.",
)
