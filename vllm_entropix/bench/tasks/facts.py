"""Tasks whose answer is a name: capitals, and classes of animals."""

from __future__ import annotations

from typing import ClassVar

from vllm_entropix.bench.extract import fold, named
from vllm_entropix.bench.tasks.base import Graded, Item, Task, chosen
from vllm_entropix.settings.section import Section

_CAPITALS = {
    "Afghanistan": "Kabul", "Albania": "Tirana", "Algeria": "Algiers", "Angola": "Luanda", "Argentina": "Buenos Aires",
    "Armenia": "Yerevan", "Australia": "Canberra", "Austria": "Vienna", "Azerbaijan": "Baku", "Bahrain": "Manama",
    "Bangladesh": "Dhaka", "Belarus": "Minsk", "Belgium": "Brussels", "Bhutan": "Thimphu", "Botswana": "Gaborone",
    "Brazil": "Brasilia", "Bulgaria": "Sofia", "Cambodia": "Phnom Penh", "Cameroon": "Yaounde", "Canada": "Ottawa",
    "Chad": "N'Djamena", "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Cyprus": "Nicosia", "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Eritrea": "Asmara",
    "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris", "Georgia": "Tbilisi",
    "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Haiti": "Port-au-Prince", "Honduras": "Tegucigalpa",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman",
    "Kenya": "Nairobi", "Laos": "Vientiane", "Latvia": "Riga", "Lebanon": "Beirut", "Libya": "Tripoli", "Lithuania": "Vilnius",
    "Madagascar": "Antananarivo", "Malaysia": "Kuala Lumpur", "Mali": "Bamako", "Malta": "Valletta", "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Mozambique": "Maputo", "Myanmar": "Naypyidaw", "Namibia": "Windhoek",
    "Nepal": "Kathmandu", "the Netherlands": "Amsterdam", "New Zealand": "Wellington", "Nicaragua": "Managua",
    "Nigeria": "Abuja", "North Korea": "Pyongyang", "Norway": "Oslo", "Oman": "Muscat", "Pakistan": "Islamabad",
    "Paraguay": "Asuncion", "Peru": "Lima", "the Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow", "Rwanda": "Kigali", "Saudi Arabia": "Riyadh",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "Somalia": "Mogadishu",
    "South Korea": "Seoul", "Spain": "Madrid", "Sudan": "Khartoum", "Sweden": "Stockholm", "Switzerland": "Bern",
    "Syria": "Damascus", "Taiwan": "Taipei", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Uganda": "Kampala",
    "Ukraine": "Kyiv", "the United Kingdom": "London", "the United States": "Washington", "Uruguay": "Montevideo",
    "Uzbekistan": "Tashkent", "Venezuela": "Caracas", "Vietnam": "Hanoi", "Yemen": "Sanaa", "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}  # fmt: skip
_ALSO = {
    "kiev": "Kyiv", "sana'a": "Sanaa", "ndjamena": "N'Djamena", "ulan bator": "Ulaanbaatar", "delhi": "New Delhi",
    "berne": "Bern", "peking": "Beijing", "washington dc": "Washington",
}  # fmt: skip
# Cities that are taken for capitals: naming one is an answer, too.
_OTHER_CITIES = (
    "Almaty", "Auckland", "Barcelona", "Casablanca", "Dar es Salaam", "Dubai", "Frankfurt", "Geneva", "Guayaquil",
    "Ho Chi Minh City", "Istanbul", "Johannesburg", "Karachi", "Lagos", "Marrakech", "Melbourne", "Milan", "Montreal",
    "Mumbai", "Munich", "New York", "Rio de Janeiro", "Rotterdam", "Saint Petersburg", "Sao Paulo", "Shanghai", "Sydney",
    "Tel Aviv", "The Hague", "Toronto", "Vancouver", "Yangon", "Zurich",
)  # fmt: skip
_CITIES = {fold(city): city for city in (*_CAPITALS.values(), *_OTHER_CITIES)} | _ALSO

_ANIMALS = {
    "mammal": "bat bear beaver camel cat cow deer dog dolphin donkey elephant fox giraffe goat gorilla hamster hedgehog horse "
    "kangaroo koala leopard lion mole monkey mouse otter pig platypus porcupine rabbit seal sheep squirrel tiger "
    "walrus whale wolf",
    "bird": "albatross blackbird canary chicken crane crow cuckoo duck eagle falcon flamingo goose gull hawk heron "
    "hummingbird kiwi ostrich owl parrot peacock pelican penguin pigeon raven robin sparrow stork swallow swan toucan "
    "turkey woodpecker",
    "fish": "barracuda carp catfish cod eel goldfish haddock halibut herring mackerel perch piranha pike salmon sardine "
    "seahorse shark sturgeon swordfish trout tuna",
    "reptile": "alligator anaconda chameleon cobra crocodile gecko iguana lizard python rattlesnake tortoise turtle viper",
    "amphibian": "axolotl bullfrog frog newt salamander toad treefrog",
    "insect": "ant bee beetle butterfly cockroach cricket dragonfly firefly flea fly grasshopper hornet ladybug locust mantis "
    "mosquito moth termite wasp",
    "arachnid": "mite scorpion spider tarantula tick",
    "crustacean": "barnacle crab crayfish krill lobster prawn shrimp",
    "mollusc": "clam mussel octopus oyster scallop slug snail squid",
}  # fmt: skip
_CLASSES = {spelling: name for name in _ANIMALS for spelling in (name, f"{name}s", *(["fishes"] if name == "fish" else []))} | {
    "mollusk": "mollusc", "mollusks": "mollusc",
    # Models know the scientific names, too.
    "mammalia": "mammal", "aves": "bird", "pisces": "fish", "reptilia": "reptile", "amphibia": "amphibian", "insecta": "insect",
    "arachnida": "arachnid", "crustacea": "crustacean", "mollusca": "mollusc",
}  # fmt: skip


class _Names(Task[Section]):
    names: ClassVar[dict[str, str]]

    def grade(self, item: Item, text: str) -> Graded:
        """Compare names."""
        found = named(text, self.names)
        return Graded(found, found == item.expected)


class Capitals(_Names):
    """Capitals of countries."""

    kind = "capitals"
    max_tokens = 48
    names = _CITIES
    rule = 'The first city named behind the last "answer", and otherwise in the text, unless "not" stands before it.'

    def items(self, count: int, seed: str) -> list[Item]:
        """Countries in random order."""
        asked = [
            Item(fold(country).removeprefix("the ").replace(" ", "-"), f"What is the capital of {country}?", capital)
            for country, capital in _CAPITALS.items()
        ]
        return chosen(self.kind, asked, count, seed)


class Animals(_Names):
    """Classes of animals."""

    kind = "animals"
    max_tokens = 64
    names = _CLASSES
    rule = 'The first class named behind the last "answer", and otherwise in the text, unless "not" stands before it.'

    def items(self, count: int, seed: str) -> list[Item]:
        """Animals in random order."""
        among = ", ".join(_ANIMALS)
        asked = [
            Item(animal, f"To which of these classes does the {animal} belong: {among}? Answer with the class.", name)
            for name, animals in _ANIMALS.items()
            for animal in animals.split()
        ]
        return chosen(self.kind, asked, count, seed)
