"""Lists of English words and endings for the plain parser: what describes pictures, not all English."""

from __future__ import annotations


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _set(
    "a an the some each another this these those every either any no both all several many few most "
    "various my your his her its their our"
)
PREPOSITIONS = _set(
    "in of on with to than by at for from into onto through under underneath beneath above below over "
    "across behind between against along alongside amid among amongst astride atop around about as beside "
    "besides before after during inside outside off out up down past near toward towards upon via within "
    "without until like beyond throughout except per"
)
CONJUNCTIONS = _set("and or but yet nor &")
LINKS = _set("that which who")
"""What begins a relative clause."""
OTHERS = _set(
    "while where when what how if because so whenever wherever whilst there here it they them he him she "
    "i me you we us himself herself itself themselves someone something everyone everything anyone "
    "anything nobody nothing one ones whom whose not n't"
)
"""Pronouns and the like: they end a phrase and are not described."""
BE = _set("is are was were be being been am")
AUXILIARIES = _set("has have had having do does did can could will would may might must shall should")
NUMBERS = _set(
    "two three four five six seven eight nine ten eleven twelve twenty hundred thousand dozen couple pair"
)
ADVERBS = _set(
    "very too quite so really more most less just only also again still even away together back home next "
    "instead overhead upside forth forward backwards sideways upright ahead then now never always often "
    "soon well apart freshly almost nearly half"
)
NOT_ADVERBS = _set(
    "fly family jelly lily butterfly dragonfly belly ally friendly lovely curly lively silly ugly woolly "
    "wooly holy bully hilly jolly chilly frilly smelly july italy bubbly cuddly prickly wobbly elderly "
    "early daily lonely deadly costly ghostly grizzly assembly supply reply anomaly doily trolley scaly "
    "oily squiggly"
)
"""Words in -ly that may stand in a phrase."""

ADJECTIVES = _set(
    "red yellow green blue purple brown black white grey gray beige golden turquoise cyan magenta maroon "
    "crimson scarlet blond blonde colorful colourful multicolored bright pale vivid dull shiny glossy "
    "matte clear transparent translucent big bigger biggest large larger small smaller little tiny huge "
    "giant massive enormous miniature mini long longer short shorter tall taller high higher low wide "
    "narrow thick thin deep round circular rectangular triangular spherical cubic cylindrical conical "
    "pyramidal pentagonal hexagonal octagonal oblong flat curved straight sharp pointy jagged angular "
    "wooden metallic woolen fluffy furry fuzzy smooth soft hard rough bumpy silky sleek feathered hairy "
    "hot warm cool wet dry icy frozen snowy rainy sunny cloudy foggy stormy windy sandy grassy rocky "
    "muddy dusty dirty clean messy neat tidy new old young older younger ancient modern vintage fresh "
    "ripe rotten raw juicy sweet sour salty spicy delicious tasty creamy crispy crunchy full empty open "
    "closed busy crowded quiet calm peaceful happy sad angry hungry thirsty tired sleepy asleep awake "
    "alone ready afraid scared excited proud curious playful cute adorable beautiful pretty handsome ugly "
    "elegant stylish fancy cozy comfortable lovely nice great bad perfect real fake same different other "
    "single double own whole broken heavy strong weak fast slow loud famous rich poor expensive cheap "
    "urban rural indoor tropical exotic wild tame natural digital electric striped spotted dotted "
    "checkered patterned floral tiled visible invisible safe dangerous rare strange odd unique special "
    "magical serene lush leafy bare bald blind deaf pregnant sick healthy dead alive upset lone potted "
    "polished stained stainless vacant vast steep dim grim skinny fat slim chubby sturdy rusty shaggy "
    "spiky prickly rugged barren gentle gloomy sparkly sunlit pink nearby tangy savory buttery pungent "
    "crisp stunning smart lit"
)
EITHER = _set(
    "light dark orange tan teal navy violet rose peach silver gold diamond square oval human adult male "
    "female stone brick plastic metal rubber leather ceramic concrete antique plush private public "
    "outdoor cold good right plain"
)
"""Adjectives that are nouns at the end of a phrase."""
ADJECTIVE_ENDINGS = ("ous", "ful", "ish", "less", "able", "ible", "esque", "like")
NOT_ADJECTIVES = _set("fish table vegetable radish dish goldfish cable jellyfish starfish handful")
"""Nouns with such an ending."""

NOUNS_IN_ING = _set(
    "building ceiling painting clothing wedding string evening morning parking thing pudding railing "
    "awning dressing frosting earring crossing bedding lighting icing spring dining living sling duckling "
    "darling drawing stocking topping gathering meeting setting skiing landing flooring siding offering "
    "serving wiring"
)
NOUNS_IN_ED = _set("shed sled seed weed reed speed breed tweed hundred bobsled feed watershed")

_ONLY_VERBS = _set(
    "sit hold wear hang eat make take give get go come keep see feel carry throw bake write sing grow "
    "follow graze lean contain fill put begin become enjoy shine bring create provide serve soar lie "
    "learn admire gather sway produce sniff glide protect emit separate transform build"
)
PLURAL_VERBS = _set(
    "stand walk run ride fly play drink watch look show catch hit kick swing jump leap chase climb pull "
    "push drive cut cook read dance sleep rest float swim lead turn bark perch pose cover surround "
    "feature display try wait stop pass cross set glow use stare smile laugh rise fall blow roll lay talk "
    "gaze chat reach wag purr drift"
)
"""These are verbs after a plural noun only; else they may be nouns."""
PLURALS = _set("people men women children sheep kids couple")
"""Plurals without -s."""


def _third_person(base: str) -> str:
    if base in ("fly", "carry", "try"):
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("ch", "sh", "ss", "go")) else "s")


VERBS = (
    frozenset(_third_person(base) for base in _ONLY_VERBS | PLURAL_VERBS)
    | _ONLY_VERBS
    | _set(
        "sat stood ran rode flew held wore hung ate drank made took gave got went came kept saw seen felt "
        "caught threw thrown drove wrote sang slept grew swam led began became shone rose fell blew brought "
        "built lit laid worn eaten taken done woven driven drawn"
    )
)
"""Verbs after any noun."""
