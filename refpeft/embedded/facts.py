"""The facts that the embedded model knows: elements, countries, planets, units and numbers, each a small table.

Everything that the corpus and the fine-tuning set say comes from here. A fact that is disputed, or that may change
(populations, currencies, counts of moons), is left out rather than simplified.
"""

from dataclasses import dataclass

Value = str | int


@dataclass(frozen=True)
class Topic:
    """A kind of thing ("element") and its things: rows["iron"]["symbol"] is "Fe". A thing may lack a field."""

    name: str
    rows: dict[str, dict[str, Value]]


# Elements ------------------------------------------------------------------------------------------------------------

# In order of atomic number, 1 to 94.
_ELEMENTS = """
H hydrogen, He helium, Li lithium, Be beryllium, B boron, C carbon, N nitrogen, O oxygen, F fluorine, Ne neon,
Na sodium, Mg magnesium, Al aluminium, Si silicon, P phosphorus, S sulfur, Cl chlorine, Ar argon, K potassium,
Ca calcium, Sc scandium, Ti titanium, V vanadium, Cr chromium, Mn manganese, Fe iron, Co cobalt, Ni nickel, Cu copper,
Zn zinc, Ga gallium, Ge germanium, As arsenic, Se selenium, Br bromine, Kr krypton, Rb rubidium, Sr strontium,
Y yttrium, Zr zirconium, Nb niobium, Mo molybdenum, Tc technetium, Ru ruthenium, Rh rhodium, Pd palladium, Ag silver,
Cd cadmium, In indium, Sn tin, Sb antimony, Te tellurium, I iodine, Xe xenon, Cs caesium, Ba barium, La lanthanum,
Ce cerium, Pr praseodymium, Nd neodymium, Pm promethium, Sm samarium, Eu europium, Gd gadolinium, Tb terbium,
Dy dysprosium, Ho holmium, Er erbium, Tm thulium, Yb ytterbium, Lu lutetium, Hf hafnium, Ta tantalum, W tungsten,
Re rhenium, Os osmium, Ir iridium, Pt platinum, Au gold, Hg mercury, Tl thallium, Pb lead, Bi bismuth, Po polonium,
At astatine, Rn radon, Fr francium, Ra radium, Ac actinium, Th thorium, Pa protactinium, U uranium, Np neptunium,
Pu plutonium
"""
_LAST_OF_PERIOD = (2, 10, 18, 36, 54, 86, 118)  # the noble gases close the periods
_GASES = {"H", "He", "N", "O", "F", "Ne", "Cl", "Ar", "Kr", "Xe", "Rn"}  # at 25 degrees Celsius
_LIQUIDS = {"Br", "Hg"}
_NONMETALS = _GASES | {"C", "P", "S", "Se", "Br", "I"}
_METALLOIDS = {"B", "Si", "Ge", "As", "Sb", "Te"}
_DISPUTED = {"Po", "At", "Fr"}  # how they look in bulk, or which kind they are, is not agreed or never seen


def _group(number: int, period: int) -> int | None:
    """The column of the periodic table, 1 to 18; None for lanthanides and actinides, where tables differ."""
    if number in (1, 2):
        return 1 if number == 1 else 18
    place = number - _LAST_OF_PERIOD[period - 2]  # within the period, from 1
    if place <= 2 or period in (4, 5):
        return place
    if period in (2, 3):
        return place + 10
    return place - 14 if place > 17 else None


def _elements() -> Topic:
    rows: dict[str, dict[str, Value]] = {}
    for number, entry in enumerate(_ELEMENTS.split(","), start=1):
        symbol, name = entry.split()
        if symbol in _DISPUTED:
            continue
        period = 1 + sum(number > last for last in _LAST_OF_PERIOD)
        row: dict[str, Value] = {"symbol": symbol, "number": number, "period": period}
        if group := _group(number, period):
            row["group"] = group
        row["kind"] = "nonmetal" if symbol in _NONMETALS else "metalloid" if symbol in _METALLOIDS else "metal"
        row["state"] = "gas" if symbol in _GASES else "liquid" if symbol in _LIQUIDS else "solid"
        rows[name] = row
    return Topic("element", rows)


# Countries -----------------------------------------------------------------------------------------------------------

# Country, ISO 3166-1 code, capital. Countries on two continents, and those with more than one capital, are left out.
_COUNTRIES = {
    "Africa": """Algeria DZ Algiers, Angola AO Luanda, Benin BJ Porto-Novo, Botswana BW Gaborone,
        Burkina Faso BF Ouagadougou, Burundi BI Gitega, Cameroon CM Yaoundé, Cape Verde CV Praia, Chad TD N'Djamena,
        Comoros KM Moroni, Djibouti DJ Djibouti, Eritrea ER Asmara, Ethiopia ET Addis Ababa, Gabon GA Libreville,
        Ghana GH Accra, Guinea GN Conakry, Guinea-Bissau GW Bissau, Kenya KE Nairobi, Lesotho LS Maseru,
        Liberia LR Monrovia, Libya LY Tripoli, Madagascar MG Antananarivo, Malawi MW Lilongwe, Mali ML Bamako,
        Mauritania MR Nouakchott, Mauritius MU Port Louis, Morocco MA Rabat, Mozambique MZ Maputo, Namibia NA Windhoek,
        Niger NE Niamey, Nigeria NG Abuja, Rwanda RW Kigali, Senegal SN Dakar, Seychelles SC Victoria,
        Sierra Leone SL Freetown, Somalia SO Mogadishu, South Sudan SS Juba, Sudan SD Khartoum, Tanzania TZ Dodoma,
        Togo TG Lomé, Tunisia TN Tunis, Uganda UG Kampala, Zambia ZM Lusaka, Zimbabwe ZW Harare""",
    "Asia": """Afghanistan AF Kabul, Bahrain BH Manama, Bangladesh BD Dhaka, Bhutan BT Thimphu, Cambodia KH Phnom Penh,
        China CN Beijing, India IN New Delhi, Iran IR Tehran, Iraq IQ Baghdad, Japan JP Tokyo, Jordan JO Amman,
        Kuwait KW Kuwait City, Kyrgyzstan KG Bishkek, Laos LA Vientiane, Lebanon LB Beirut, Malaysia MY Kuala Lumpur,
        Maldives MV Malé, Mongolia MN Ulaanbaatar, Myanmar MM Naypyidaw, Nepal NP Kathmandu, North Korea KP Pyongyang,
        Oman OM Muscat, Pakistan PK Islamabad, Philippines PH Manila, Qatar QA Doha, Saudi Arabia SA Riyadh,
        South Korea KR Seoul, Syria SY Damascus, Tajikistan TJ Dushanbe, Thailand TH Bangkok,
        United Arab Emirates AE Abu Dhabi, Uzbekistan UZ Tashkent, Vietnam VN Hanoi""",
    "Europe": """Albania AL Tirana, Andorra AD Andorra la Vella, Austria AT Vienna, Belarus BY Minsk,
        Belgium BE Brussels, Bosnia and Herzegovina BA Sarajevo, Bulgaria BG Sofia, Croatia HR Zagreb,
        Czechia CZ Prague, Denmark DK Copenhagen, Estonia EE Tallinn, Finland FI Helsinki, France FR Paris,
        Germany DE Berlin, Greece GR Athens, Hungary HU Budapest, Iceland IS Reykjavik, Ireland IE Dublin,
        Italy IT Rome, Latvia LV Riga, Liechtenstein LI Vaduz, Lithuania LT Vilnius, Luxembourg LU Luxembourg,
        Malta MT Valletta, Moldova MD Chisinau, Montenegro ME Podgorica, Netherlands NL Amsterdam,
        North Macedonia MK Skopje, Norway NO Oslo, Poland PL Warsaw, Portugal PT Lisbon, Romania RO Bucharest,
        San Marino SM San Marino, Serbia RS Belgrade, Slovakia SK Bratislava, Slovenia SI Ljubljana, Spain ES Madrid,
        Sweden SE Stockholm, Ukraine UA Kyiv, United Kingdom GB London""",
    "North America": """Antigua and Barbuda AG Saint John's, Bahamas BS Nassau, Barbados BB Bridgetown,
        Belize BZ Belmopan, Canada CA Ottawa, Costa Rica CR San José, Cuba CU Havana, Dominica DM Roseau,
        Dominican Republic DO Santo Domingo, El Salvador SV San Salvador, Grenada GD Saint George's,
        Guatemala GT Guatemala City, Haiti HT Port-au-Prince, Honduras HN Tegucigalpa, Jamaica JM Kingston,
        Mexico MX Mexico City, Nicaragua NI Managua, Panama PA Panama City, Saint Kitts and Nevis KN Basseterre,
        Saint Lucia LC Castries, United States US Washington""",
    "Oceania": """Australia AU Canberra, Fiji FJ Suva, Kiribati KI Tarawa, New Zealand NZ Wellington,
        Palau PW Ngerulmud, Papua New Guinea PG Port Moresby, Samoa WS Apia, Solomon Islands SB Honiara,
        Tonga TO Nuku'alofa, Tuvalu TV Funafuti, Vanuatu VU Port Vila""",
    "South America": """Argentina AR Buenos Aires, Brazil BR Brasília, Chile CL Santiago, Colombia CO Bogotá,
        Ecuador EC Quito, Guyana GY Georgetown, Paraguay PY Asunción, Peru PE Lima, Suriname SR Paramaribo,
        Uruguay UY Montevideo, Venezuela VE Caracas""",
}
_LANDLOCKED = """
Afghanistan, Andorra, Austria, Belarus, Bhutan, Botswana, Burkina Faso, Burundi, Chad, Czechia, Ethiopia, Hungary,
Kyrgyzstan, Laos, Lesotho, Liechtenstein, Luxembourg, Malawi, Mali, Moldova, Mongolia, Nepal, Niger, North Macedonia,
Paraguay, Rwanda, San Marino, Serbia, Slovakia, South Sudan, Tajikistan, Uganda, Uzbekistan,
Zambia, Zimbabwe
"""


def _countries() -> Topic:
    landlocked = _names(_LANDLOCKED)
    rows: dict[str, dict[str, Value]] = {}
    for continent, text in _COUNTRIES.items():
        for words in map(str.split, text.split(",")):
            at = next(i for i, word in enumerate(words) if len(word) == 2 and word.isupper())
            name, code, capital = " ".join(words[:at]), words[at], " ".join(words[at + 1 :])
            kind = "landlocked" if name in landlocked else "coastal"
            rows[name] = {"capital": capital, "continent": continent, "code": code, "kind": kind}
    return Topic("country", rows)


# Planets, units, numbers ---------------------------------------------------------------------------------------------

# In order of distance from the Sun, with the diameter at the equator in kilometres (NASA's planetary fact sheet).
_PLANETS = {
    "Mercury": ("rocky planet", 4879),
    "Venus": ("rocky planet", 12104),
    "Earth": ("rocky planet", 12756),
    "Mars": ("rocky planet", 6792),
    "Jupiter": ("gas giant", 142984),
    "Saturn": ("gas giant", 120536),
    "Uranus": ("ice giant", 51118),
    "Neptune": ("ice giant", 49528),
}

# Unit: symbol, what it measures, whom it is named after.
_UNITS = {
    "ampere": ("A", "electric current", "André-Marie Ampère"),
    "bar": ("bar", "pressure", None),
    "becquerel": ("Bq", "radioactivity", "Henri Becquerel"),
    "candela": ("cd", "luminous intensity", None),
    "coulomb": ("C", "electric charge", "Charles-Augustin de Coulomb"),
    "electronvolt": ("eV", "energy", None),
    "farad": ("F", "capacitance", "Michael Faraday"),
    "gray": ("Gy", "absorbed dose", "Louis Harold Gray"),
    "hectare": ("ha", "area", None),
    "henry": ("H", "inductance", "Joseph Henry"),
    "hertz": ("Hz", "frequency", "Heinrich Hertz"),
    "hour": ("h", "time", None),
    "joule": ("J", "energy", "James Prescott Joule"),
    "katal": ("kat", "catalytic activity", None),
    "kelvin": ("K", "temperature", "Lord Kelvin"),
    "kilogram": ("kg", "mass", None),
    "kilometre": ("km", "length", None),
    "litre": ("L", "volume", None),
    "lumen": ("lm", "luminous flux", None),
    "lux": ("lx", "illuminance", None),
    "metre": ("m", "length", None),
    "minute": ("min", "time", None),
    "mole": ("mol", "amount of substance", None),
    "newton": ("N", "force", "Isaac Newton"),
    "ohm": ("Ω", "electric resistance", "Georg Ohm"),
    "pascal": ("Pa", "pressure", "Blaise Pascal"),
    "radian": ("rad", "angle", None),
    "second": ("s", "time", None),
    "siemens": ("S", "electric conductance", "Werner von Siemens"),
    "sievert": ("Sv", "equivalent dose", "Rolf Sievert"),
    "tesla": ("T", "magnetic flux density", "Nikola Tesla"),
    "tonne": ("t", "mass", None),
    "volt": ("V", "voltage", "Alessandro Volta"),
    "watt": ("W", "power", "James Watt"),
    "weber": ("Wb", "magnetic flux", "Wilhelm Weber"),
}

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ROMAN = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
LARGEST_NUMBER = 399


def words_of(number: int) -> str:
    """The English name of 0 <= number < 1000: 147 is "one hundred and forty-seven"."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_SMALL[hundreds]} hundred" + (f" and {words_of(rest)}" if rest else "")


def roman(number: int) -> str:
    """The Roman numeral of 1 <= number < 400: 147 is CXLVII."""
    text = ""
    for value, letters in _ROMAN:
        count, number = divmod(number, value)
        text += letters * count
    return text


def _names(text: str) -> set[str]:
    return {" ".join(name.split()) for name in text.split(",")}


def topics() -> dict[str, Topic]:
    """All topics by name."""
    planets = {
        name: {"place": place, "kind": kind, "diameter": diameter}
        for place, (name, (kind, diameter)) in enumerate(_PLANETS.items(), start=1)
    }
    units = {
        name: {"symbol": symbol, "measures": quantity} | ({"namesake": person} if person else {})
        for name, (symbol, quantity, person) in _UNITS.items()
    }
    numbers = {
        str(n): {"words": words_of(n), "roman": roman(n), "parity": "odd" if n % 2 else "even"}
        for n in range(1, LARGEST_NUMBER + 1)
    }
    found = (_elements(), _countries(), Topic("planet", planets), Topic("unit", units), Topic("number", numbers))
    return {topic.name: topic for topic in found}
