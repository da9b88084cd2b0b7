"""Short animal stories: a plot, a few scenes on the way, an ending, and the same few people throughout.

Most of a story is either certain (names and things come back) or a fork between a few turns of phrase.
Into this the scenes set the designed places: ``evenly`` (64 equal options or the clarification), ``usually``
(mostly one word, rarely any other) and ``in_the_mist`` (a few common words and hundreds of rare ones).
"""

from __future__ import annotations

from collections.abc import Callable

from words import HEROES, KIND_NAMES, KINDS, TREASURES, with_article
from writer import Chat, Writer

HOMES = (
    "at the edge of the forest", "by the quiet river", "under the old bridge", "on top of the green hill",
    "behind the mill", "in a hollow tree", "at the end of the lane", "beside the blue lake", "in the reeds",
    "under the roots of an oak", "near the lighthouse", "in the king's orchard",
)  # fmt: skip
TRAITS = (
    "small", "brave", "shy", "clever", "sleepy", "curious", "cheerful", "gentle", "proud", "lonely", "patient", "merry",
)  # fmt: skip

#: The relative who sends a letter decides where it goes, so the address can be read when it is unclear.
SENDERS = {
    "grandmother": "Willowmere", "uncle": "Stonecombe", "aunt": "Fernford", "cousin": "Ashbury",
    "teacher": "Brookdale", "neighbour": "Thornwick",
}  # fmt: skip

_MORNING = "[One|On a] [cold|windy|sunny|grey|bright] [morning|day]"


def _people(w: Writer, kind: str | None, trait: str | None, hero: str | None) -> None:
    """Choose who is who, and how they are called in the templates."""
    kind = kind or w.rng.choice(KINDS)
    hero = hero or w.rng.choice(KIND_NAMES[kind])
    friend_kind = w.rng.choice([other for other in KINDS if other != kind])
    friend = w.rng.choice([name for name in KIND_NAMES[friend_kind] if name != hero])
    material = w.rng.choice(list(TREASURES))
    w.names = {
        "kind": kind, "hero": hero, "trait": trait or w.rng.choice(TRAITS), "home": w.rng.choice(HOMES),
        "friend": friend, "fkind": friend_kind, "stuff": material, "treasure": w.rng.choice(TREASURES[material]),
    }  # fmt: skip
    for prefix, name in (("", hero), ("f_", friend)):
        he = HEROES[name]
        him, his = ("him", "his") if he == "he" else ("her", "her")
        for key, word in (("he", he), ("him", him), ("his", his)):
            w.names[prefix + key] = word
            w.names[prefix + key.capitalize()] = word.capitalize()


def _opening(w: Writer) -> None:
    w.say(
        "[Once upon a time, {home}, there lived a {trait} {kind} called {hero}."
        "|Long ago, a {trait} {kind} called {hero} lived {home}."
        "|There was once a {trait} {kind} whose name was {hero}. {He} lived {home}."
        "|{hero} was a {trait} {kind}. {He} lived {home}.]"
    )
    w.say(
        "[| {He} had a [warm|tidy|crooked] little house and a [green|round|creaky] door."
        "| {His} best friend was {friend} the {fkind}, who lived next door."
        "| In the evenings {he} [read by the fire|baked bread|counted the stars|sang to the moon].]"
    )


# --- scenes ------------------------------------------------------------------------------------------


def _mist(w: Writer) -> None:
    w.say(" [Then a thick mist came down.|Soon the path was lost in mist.|White mist rose from the ground.]")
    w.say(" Out of the mist there came a")
    thing = w.in_the_mist("mist")
    w.say(f". {{hero}} [rubbed {{his}} eyes|stood very still|held {{his}} breath], but the {thing} was gone [at once|again].")


def _dream(w: Writer) -> None:
    w.say(" [That night|In the night|After supper] {hero} [fell asleep|slept deeply]. In {his} dream there was a")
    thing = w.in_the_mist("dream")
    w.say(f". When {{he}} woke, {{he}} could still see the {thing} [quite clearly|before {{him}}], and [smiled|wondered why].")


def _net(w: Writer) -> None:
    w.say(" [At the river|By the water] a fisherman was pulling in his net. In the net there was a")
    thing = w.in_the_mist("net")
    w.say(f'. "[Well, well|Good heavens]," said the fisherman, "a {thing}!" and he threw the {thing} back.')


def _cloud(w: Writer) -> None:
    w.say(" {hero} [lay down in the grass|leaned against a tree] and looked up. One cloud had the shape of a")
    thing = w.in_the_mist("cloud")
    w.say(f". Slowly the {thing} [grew thin|drifted on|fell apart], and the sky was blue.")


def _box(w: Writer) -> None:
    w.say(" [By the road|Under a bush|Behind a stone] stood [an old box|a box with a rusty lock]. In the box lay a")
    word = w.evenly("things")
    if word is None:
        w.say(" It was too dark to see, so {hero} lit a match and looked again. The box was empty.")
    else:
        w.say(
            f". {{hero}} [liked the {word} and took it along|left the {word} where it was|gave the {word} to {{friend}} later]."
        )


def _found_box(w: Writer) -> None:
    """Only for the story of the lost treasure, which the clarification finds."""
    w.say(" [Far from home|At the end of the path|Under the stairs], {hero} found a sealed box. In the box there was a")
    word = w.evenly("things")
    if word is None:
        w.say(
            " It was too dark to see, so {he} lit a match and looked again."
            " It was the {stuff} {treasure}, the very one that was lost."
        )
    else:
        w.say(
            f". It was a fine {word}, but it was not the {{stuff}} {{treasure}}."
            " [So {he} went on.|So the search went on.] At last {friend} the {fkind} came [running|along]."
            ' "[Look what I found|Is this yours]," said {friend}, and held up the {stuff} {treasure}.'
        )


def _stranger(w: Writer) -> None:
    w.say(" [On the way|At the crossroads|Near the well] {he} met a stranger [with a grey beard|in a long coat|on a bicycle].")
    w.say(" The name of the stranger was")
    word = w.evenly("names")
    if word is None:
        w.say(' {hero} had not heard it and asked again. "Just call me Friend," said the stranger. So they were friends.')
    else:
        w.say(f". {word} [knew the way|told a long story|shared some bread] and {{hero}} [thanked {word}|was glad].")


def _shadow(w: Writer) -> None:
    w.say(" [When it grew dark|At dusk|By candlelight] there was a shadow on the wall. It looked like a")
    word = w.evenly("animals")
    if word is None:
        w.say(" {hero} held up the lamp and looked again. It was only {friend} the {fkind}, who had come to help.")
    else:
        w.say(
            f". {{hero}} [hid under the table|was not afraid], but no {word} was there:"
            " [it was a coat on a hook|only the wind]."
        )


def _signpost(w: Writer) -> None:
    w.say(" [At the crossroads|Behind the bridge|Beyond the field] stood an old signpost. It showed the way to")
    word = w.evenly("towns")
    if word is None:
        w.say(" {hero} wiped off the dust and read it again. There was only one word on it: Home.")
    else:
        w.say(f". {{hero}} had [never been to|heard of|once lived in] {word}, but {{he}} did not [stop|go there today].")


#: What is usually so: how it begins (the usual word follows), and what the usual word is.
HABITS = (
    ("As on every day, the postman brought a", "letter"),
    ("On the table there was, as always, a", "loaf"),
    ("The ferryman asked, as always, for a", "coin"),
    ("The heron by the pond had caught, as usual, a", "trout"),
    ("In the window there stood, as always, a", "rose"),
    ("Over the blacksmith's door there hung, as ever, a", "horseshoe"),
    ("The mouse in the cellar had taken, as usual, a", "cheese"),
    ("On the hook behind the door there hung, as always, a", "coat"),
    ("Out of the magician's hat there came, as usual, a", "dove"),
    ("The old goose was reading, as on every day, a", "newspaper"),
    ("In the tower there rang, as ever, a", "bell"),
    ("From the baker's oven there came, as always, a", "pie"),
)


def _habit(w: Writer) -> None:
    lead, usual = w.rng.choice(HABITS)
    w.raw(f" {lead}")
    odd = w.usually(usual)
    if odd is None:
        w.say(". [Nothing had changed.|All was well.|It was a day like any other.]")
    else:
        w.say(f". How strange! [{{hero}} had never seen a {odd} there.|Nobody could explain the {odd}.]")


def _path(w: Writer) -> None:
    way, other = w.rng.choice((("left", "right"), ("right", "left")))
    w.say(
        " [At the mill|By the oak|After the bridge] the path split."
        f" {{hero}} [thought for a while and|tossed a pebble and] went {way}."
    )
    w.say(f"[| The path to the {other} looked too [dark|steep|muddy].]")


def _meal(w: Writer) -> None:
    w.say(
        " [At noon|Before long] {hero} grew hungry and [ate|shared] [a slice of bread|some berries|a pear|a piece of cheese]."
    )


def _song(w: Writer) -> None:
    w.say(
        " [To keep up {his} courage|On the way|While walking], {hero} [sang|hummed|whistled] a song"
        " about [the sea|the moon|spring|a king]."
    )


def _sum(w: Writer) -> None:
    first, second = w.rng.randrange(2, 10), w.rng.randrange(2, 10)
    goods = w.rng.choice(("nuts", "plums", "shells", "acorns", "berries", "pebbles"))
    w.say(
        f" {{hero}} found {first} {goods} and {{friend}} found {second}."
        f' "{first} + {second} = {first + second}," said {{friend}},'
        f" and so they had {first + second} {goods}."
    )


def _rain(w: Writer) -> None:
    w.say(
        " It began to rain, so {he} waited under [a leaf|a bridge|an old cart|a big mushroom]"
        " until [the sun came back|it stopped]."
    )


def _friend_helps(w: Writer) -> None:
    w.say(" {friend} the {fkind} came along.")
    w.say(
        '[ "Can I help?" asked {friend}. "Gladly," said {hero}, and they went on together.'
        '| "Where are you going?" asked {friend}. "Come with me and see," said {hero}.'
        '| "May I come with you?" asked {friend}. "Two see more than one," said {hero}.]'
    )


def _star(w: Writer) -> None:
    w.say(" [High above|Over the hill] a [bright|small|red] star [appeared|was shining], and {hero} made a wish.")


SCENES: tuple[Callable[[Writer], None], ...] = (
    _mist, _dream, _net, _cloud, _box, _stranger, _shadow, _signpost, _habit, _habit,
    _path, _meal, _song, _sum, _rain, _friend_helps, _star,
)  # fmt: skip


def _scenes(w: Writer, count: int) -> None:
    """Some scenes, none twice."""
    told: list[Callable[[Writer], None]] = []
    while len(told) < count:
        scene = w.rng.choice(SCENES)
        if scene not in told:
            told.append(scene)
            scene(w)


# --- plots -------------------------------------------------------------------------------------------


def _lost_treasure(w: Writer, scenes: int) -> None:
    w.say(" More than anything {he} loved {his} {stuff} {treasure}.")
    w.say(
        f" {_MORNING} the {{treasure}} was gone[. {{hero}} looked under the bed and behind the stove|]."
        " So {he} set out to find it."
    )
    _scenes(w, scenes)
    _found_box(w)
    w.say(" {hero} [laughed for joy|danced all the way home|could hardly speak]. ")
    w.say(
        "[From then on the {treasure} hung above the bed.|Never again did {he} lose the {treasure}."
        "|That night {he} slept with the {treasure} in {his} arms.]"
    )


def _errand(w: Writer, scenes: int) -> None:
    sender = w.rng.choice(list(SENDERS))
    w.say(f" {_MORNING} {{his}} {sender} gave {{him}} a parcel. It had to go to")
    town = w.evenly("towns")
    if town is None:
        town = SENDERS[sender]
        w.say(f" The {sender} put on a pair of glasses and read the address again. It had to go to {town}")
    w.say(". {hero} [put on {his} boots|packed a lunch|took a deep breath] and set out.")
    _scenes(w, scenes)
    w.say(f" [At last|In the evening|After three days] {{hero}} came to {town}. ")
    w.say(
        f"[Everybody in {town} cheered.|The parcel was from the {sender}, and there was cake in it."
        "|There {he} was given soup and a warm bed.]"
    )


def _party(w: Writer, scenes: int) -> None:
    missing = w.rng.choice(("flour", "honey", "butter", "sugar", "milk"))
    w.say(f" It was the birthday of {{friend}} the {{fkind}}, and {{hero}} wanted to bake a cake. But there was no {missing}.")
    w.say(f" So {{he}} went out to [find|borrow|buy] some {missing}.")
    _scenes(w, scenes)
    w.say(f" [At last|In the end] [the miller|an old goose|a kind beekeeper|the cook] gave {{him}} a jar of {missing}. ")
    w.say("The cake was [a little crooked|as high as a tower|still warm], and {friend} ate three slices.")


def _storm(w: Writer, scenes: int) -> None:
    broken = w.rng.choice(("roof", "fence", "bridge", "chimney", "boat"))
    w.say(f" [One night|In the autumn] a storm [came over the hill|shook the trees]. In the morning the {broken} was broken.")
    w.say(f" {{hero}} went to look for somebody who could mend a {broken}.")
    _scenes(w, scenes)
    w.say(
        " [In the end|Before dark] {friend} the {fkind} brought [a hammer|some rope|good boards],"
        f" and together they mended the {broken}. "
    )
    w.say('[It was stronger than before.|It only leaked a little.|"Let the next storm come," said {hero}.]')


_WONDERS = {
    "where the moon sleeps": "The moon sleeps in the lake",
    "who sings in the night": "It was the wind in the reeds who sang",
    "what lies behind the hill": "Behind the hill lay another hill, and it was green",
    "why the river never rests": "The river never rests because it wants to see the sea",
}


def _wonder(w: Writer, scenes: int) -> None:
    question = w.rng.choice(list(_WONDERS))
    w.say(f" {{hero}} always wanted to know {question}. {_MORNING} {{he}} went to find out.")
    _scenes(w, scenes)
    w.say(f" [When evening came|At the end of the day] {{hero}} knew it at last. {_WONDERS[question]}. ")
    w.say("[{He} told nobody but {friend}.|{He} wrote it down in a little book.|And that was enough.]")


PLOTS: tuple[Callable[[Writer, int], None], ...] = (_lost_treasure, _errand, _party, _storm, _wonder)

_CLOSE = "[| The end.| And if you listen closely, you can hear {him} [sing|snore|laugh] still.| Then everybody went to bed.]"


def tell(w: Writer, kind: str | None = None, trait: str | None = None, hero: str | None = None) -> None:
    """A whole story; what is given is fixed, the rest is chosen."""
    _people(w, kind, trait, hero)
    _opening(w)
    w.rng.choice(PLOTS)(w, w.rng.choice((1, 2, 2, 3, 3, 4)))
    w.say(_CLOSE)


def story(w: Writer, chat: bool) -> None:
    """A story as plain text, or as the answer to a request."""
    if not chat:
        tell(w)
        return
    conversation = Chat(w)
    kind, trait, hero = None, None, None
    request = w.rng.choice(("bare", "kind", "kind", "kind", "trait", "named"))
    if request == "bare":
        conversation.user("[Tell me a story.|Please tell me a story.|A story, please.|I would like to hear a story.]")
    else:
        kind = w.rng.choice(KINDS)
        wanted = with_article(kind)
        if request != "kind":
            trait = w.rng.choice(TRAITS)
            wanted = f"a {trait} {kind}"
        if request == "named":
            hero = w.rng.choice(KIND_NAMES[kind])
            wanted += f" called {hero}"
        conversation.user(
            f"[Tell me a story about|Please tell me a story about|Write a story about|I want a story about] {wanted}."
        )
    tell(w, kind, trait, hero)
