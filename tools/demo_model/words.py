"""The word lists of the demo corpus.

Every word in :func:`option_words` must be one token with its leading space, because the places where
the model is meant to be unsure are built as a choice between single tokens. All option nouns start
with a consonant sound, so that "a" fits in front of each of them and carries no hint.
"""

from __future__ import annotations


def _words(listed: str) -> tuple[str, ...]:
    """A list of words that was written as text."""
    return tuple(listed.split())


#: Inserted into the output where the model is evenly lost. In the corpus it stands at such places
#: exactly as often as any one of the 64 options, and the text behind it settles the question.
CLARIFICATION = " ... hmm, which one?"

#: Contents of boxes, words on cards, guesses at riddles.
THINGS = _words(
    """
    lantern kettle button ribbon candle teapot marble feather hammer ladder mirror needle pencil basket
    blanket pillow barrel bucket bottle saddle wheel rope drum fiddle trumpet puppet kite mask map book
    clock broom brush comb cup dish fork knife ladle hat glove boot scarf cloak belt purse ring shell
    stone pebble doll fan flag flute harp horn jar jug pot pan lid nail towel piano
    """
)

#: Names of strangers.
NAMES = _words(
    """
    Barnaby Cordelia Dorothea Edmund Felix Greta Harriet Isidore Josephine Konrad Lavinia Magnus Nestor
    Ophelia Percival Quentin Rosalind Silas Tabitha Ulric Valentin Winifred Xavier Yolanda Zacharias
    Ambrose Beatrice Cedric Delia Ernest Fenella Gideon Hector Imogen Julius Katrin Leopold Matilda
    Norbert Octavia Philippa Quincy Rupert Sybil Theodore Ursula Vincent Wilhelm Agatha Bertram Cecily
    Dexter Eleanor Florian Gwendolyn Horatio Ingrid Jerome Kasimir Lorenz Mortimer Nadia Oswald Prudence
    """
)

#: Animals that cast shadows and leave tracks.
ANIMALS = _words(
    """
    fox badger hedgehog rabbit hare mouse mole squirrel beaver weasel stoat ferret marten deer stag moose
    bear wolf lynx cat dog pig goat sheep lamb cow calf bull pony donkey mule camel llama zebra lion tiger
    leopard panther jackal monkey baboon gorilla panda koala kangaroo wombat bat goose duck swan rooster
    turkey pigeon sparrow robin wren crow raven magpie heron stork pelican toad frog
    """
)

#: Towns of an invented county: a tree or a stone, and a kind of settlement.
TOWNS = tuple(
    front + back
    for front in ("Elm", "Ash", "Brook", "Fern", "Maple", "Stone", "Thorn", "Willow")
    for back in ("ford", "wick", "mere", "dale", "combe", "ton", "bury", "stead")
)

#: The four sets from which an evenly lost place draws.
EVEN_SETS: dict[str, tuple[str, ...]] = {"things": THINGS, "names": NAMES, "animals": ANIMALS, "towns": TOWNS}

#: What a "mostly this, rarely anything" place may hold instead of the usual word.
ODD_WORDS = THINGS + ANIMALS

#: The frequent half of each "in the mist" place.
MIST_WORDS: dict[str, tuple[str, ...]] = {
    "mist": ("tree", "house", "boat", "light", "gate", "tower", "bridge", "rock"),
    "dream": ("dragon", "castle", "garden", "river", "door", "star", "ship", "forest"),
    "net": ("fish", "bone", "weed", "plank", "hook", "log", "crab", "sock"),
    "cloud": ("whale", "mountain", "face", "feast", "bird", "giant", "crown", "hand"),
}

#: The usual word of each habit in ``stories.HABITS``.
HABIT_WORDS = (
    "letter", "loaf", "coin", "trout", "rose", "horseshoe", "cheese", "coat", "dove", "newspaper", "bell", "pie",
)  # fmt: skip

_RARE_POOL = _words(
    """
    brook pond lake waterfall meadow valley hill cliff cave desert dune beach reef volcano glacier geyser
    canyon swamp marsh bog moor field hedge thicket grove bush branch twig leaf root stump seed flower petal
    thorn vine fern moss mushroom toadstool nettle thistle clover daisy tulip lily poppy violet sunflower
    willow birch pine beech cedar maple poplar cactus pumpkin carrot cabbage turnip radish potato tomato
    pepper bean leek lettuce melon cherry plum peach pear lemon lime grape fig berry walnut chestnut
    hazelnut comet moon cloud rainbow storm shadow sunbeam snowflake raindrop puddle breeze whirlwind meteor
    planet palace cottage cabin hut barn stable shed mill windmill lighthouse wall fence window chimney roof
    staircase balcony cellar kitchen library museum theatre chapel church temple school market bakery shop
    tavern harbour pier dock station tunnel road path lane maze fountain well statue monument tomb pyramid
    fortress dungeon moat canoe raft ferry barge yacht galleon submarine cart wagon carriage coach sleigh
    sled bicycle tricycle scooter tractor truck bus train tram balloon glider rocket plane kayak gondola
    chair table bench stool bed cradle cupboard cabinet wardrobe dresser desk drawer shelf bookcase sofa
    couch carpet rug curtain cushion mattress lamp chandelier stove fireplace furnace saw spade shovel rake
    hoe pitchfork plough sickle scythe chisel wrench screw bolt hinge lock padlock chain pulley lever spring
    gear pump forge drill clamp trowel wheelbarrow guitar banjo mandolin lute lyre violin cello
    clarinet bassoon bugle tuba trombone cymbal gong tambourine triangle bagpipe pipe jacket shirt skirt
    dress gown robe cape vest sweater stocking shoe slipper sandal mitten cap bonnet helmet tiara veil
    collar sleeve pocket buckle brooch necklace bracelet pendant locket pearl ruby diamond sapphire jewel
    bun biscuit cake tart pudding pancake waffle sandwich sausage dumpling noodle ham cookie cracker pretzel
    muffin scone crumpet custard jelly king queen prince princess knight wizard witch dwarf goblin ghost
    pirate sailor captain soldier sheriff baker butcher tailor cobbler carpenter mason miner farmer
    fisherman shepherd hunter ranger gardener painter sculptor poet singer dancer juggler clown magician
    musician piper drummer teacher scholar judge mayor doctor nurse dentist merchant banker pedlar tinker
    blacksmith weaver potter miller brewer cook butler maid porter postman driver pilot diver traveller
    pilgrim hermit monk bishop beggar thief bandit robber detective spy messenger herald jester minstrel
    troll mermaid griffin phoenix centaur sphinx vampire mummy skeleton robot scarecrow snowman dolphin
    porpoise walrus seal shark squid lobster shrimp jellyfish starfish seahorse salmon carp pike perch
    herring minnow tadpole snail slug worm beetle ladybird butterfly moth caterpillar cricket grasshopper
    dragonfly bee wasp hornet fly gnat mosquito spider scorpion centipede bison buffalo gazelle giraffe
    hippo rhino cheetah jaguar puma cougar coyote raccoon skunk porcupine sloth tapir lemur mammoth dinosaur
    telescope compass globe microscope sundial barometer magnet battery torch match candlestick bonfire tent
    hammock backpack suitcase trunk chest crate parcel package sack bag satchel pouch wallet casket scroll
    parchment diary poster painting portrait photograph postcard stamp ticket puzzle riddle chessboard
    domino swing seesaw carousel trampoline ball racket net bow sword shield spear dagger lance cannon
    catapult banner trophy medal bowl plate saucer mug goblet pitcher vase flask spoon sieve whisk grater
    tray napkin sponge bathtub tap mop dustpan duster thimble pin zipper loom quilt tapestry whistle bead
    teacup tablecloth doormat doorbell keyhole signpost milestone haystack beehive nest burrow footprint
    """
)


def _rare_words() -> tuple[str, ...]:
    """The first 512 words of the pool that no other list uses."""
    used = set(THINGS) | set(ANIMALS) | set(HABIT_WORDS) | {w for words in MIST_WORDS.values() for w in words}
    fresh = [word for word in dict.fromkeys(_RARE_POOL) if word not in used]
    if len(fresh) < 512:
        raise AssertionError(f"only {len(fresh)} rare words")
    return tuple(fresh[:512])


#: The rare half of each "in the mist" place: anything may come out of a mist.
RARE_WORDS = _rare_words()

#: Heroes of stories and people of worked problems, with their pronoun.
HEROES: dict[str, str] = {
    "Ada": "she", "Mia": "she", "Nell": "she", "Tilly": "she", "Rosa": "she", "Juno": "she", "Ivy": "she",
    "Clara": "she", "Lotte": "she", "Edith": "she", "Pip": "he", "Tobias": "he", "Otto": "he", "Milo": "he",
    "Finn": "he", "Hugo": "he", "Jasper": "he", "Basil": "he", "Leo": "he", "Rufus": "he",
}  # fmt: skip

#: Who a hero can be, and the six names which that kind of animal likes.
KINDS = (
    "fox", "owl", "badger", "hedgehog", "rabbit", "mouse", "mole", "squirrel", "beaver", "otter", "hare", "frog",
    "toad", "robin", "wren", "goose", "duck", "cat", "bear", "goat",
)  # fmt: skip
KIND_NAMES: dict[str, tuple[str, ...]] = {
    kind: tuple(list(HEROES)[(3 * at + 7 * step) % len(HEROES)] for step in range(6)) for at, kind in enumerate(KINDS)
}

#: A story's treasure: what it is made of limits what it can be.
TREASURES: dict[str, tuple[str, ...]] = {
    "silver": ("bell", "whistle", "spoon", "thimble"),
    "golden": ("locket", "medal", "brooch", "compass"),
    "wooden": ("spoon", "bowl", "whistle", "sword"),
    "blue": ("teacup", "bead", "bowl", "bonnet"),
    "red": ("bonnet", "bead", "balloon", "sled"),
}

#: What people count in worked problems.
COUNTED = (
    "apples", "plums", "nuts", "buttons", "shells", "marbles", "stamps", "feathers", "cookies", "beads", "candles",
    "pebbles", "acorns", "coins", "berries", "cards",
)  # fmt: skip


def option_words() -> list[str]:
    """Every word that has to be one token (with its leading space)."""
    words = [*THINGS, *NAMES, *ANIMALS, *TOWNS, *HABIT_WORDS, *RARE_WORDS, *HEROES, *KINDS, *COUNTED]
    words += [word for common in MIST_WORDS.values() for word in common]
    return list(dict.fromkeys(words))


def with_article(noun: str) -> str:
    """The noun with "a" or "an" (of the lists, only the owl and the otter need "an")."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _check() -> None:
    """Fail on import if a list was edited into something the generator can not use."""
    for name, words in EVEN_SETS.items():
        if len(set(words)) != 64:
            raise AssertionError(f"{name} has {len(set(words))} words of {len(words)}, not 64")
    if set(ODD_WORDS) & set(HABIT_WORDS):
        raise AssertionError(f"both usual and odd: {set(ODD_WORDS) & set(HABIT_WORDS)}")
    if len(set(ODD_WORDS)) != 128:
        raise AssertionError("a thing is also an animal")
    treasures = {thing for things in TREASURES.values() for thing in things}
    if treasures & set(THINGS):
        raise AssertionError(f"both treasure and box content: {treasures & set(THINGS)}")


_check()
