"""Words of many languages, from which sentences are drawn."""

from __future__ import annotations

# espeak language code → common words in the language's own spelling
_TEXT: dict[str, str] = {
    "en": (
        "the a my our river house morning people walked under bright water carried small children over green hills "
        "because nobody wanted another window slowly opened every garden with strange music after"
    ),
    "de": (
        "der die das ein kleine Haus Straße zwischen Bäumen läuft schnell über Brücke niemand möchte heute Abend "
        "schöne Bücher lesen wir haben gestern nicht gefunden durch dunkle Wälder mit Freunden"
    ),
    "fr": (
        "le la une petite maison dans rue près jardin nous avons toujours mangé avec des enfants heureux pendant "
        "soirée il pleut beaucoup sur montagne mais personne voulait partir demain matin chez"
    ),
    "es": (
        "el la una casa pequeña cerca del río siempre cantaba mujer hermosa con niños alegres por mañana nunca "
        "hemos visto tantas estrellas sobre montaña pero ellos quieren volver ahora hacia"
    ),
    "it": (
        "il la una piccola casa vicino al fiume sempre cantava donna bella con bambini felici ogni mattina non "
        "abbiamo visto tante stelle sopra montagna ma vogliono tornare adesso dalla città"
    ),
    "pt": (
        "o a uma casa pequena perto do rio sempre cantava mulher bonita com crianças felizes pela manhã não "
        "vimos tantas estrelas sobre montanha mas eles querem voltar agora para coração"
    ),
    "nl": (
        "de het een klein huis tussen bomen loopt snel over brug niemand wil vanavond mooie boeken lezen wij "
        "hebben gisteren niets gevonden door donkere bossen met goede vrienden geluid vogels"
    ),
    "sv": (
        "en ett den lilla stugan mellan träden springer snabbt över bron ingen vill ikväll läsa vackra böcker vi "
        "har igår inte hittat genom mörka skogar med goda vänner sjön fåglar sjunger"
    ),
    "pl": (
        "mały dom przy rzece zawsze śpiewała piękna kobieta dzieci szczęśliwe każdego ranka nie widzieliśmy "
        "tyle gwiazd nad górami ale chcą wrócić teraz przez ciemny las dobrymi przyjaciółmi"
    ),
    "ru": (
        "маленький дом у реки всегда пела красивая женщина дети счастливые каждое утро мы не видели столько "
        "звёзд над горами но они хотят вернуться сейчас через тёмный лес друзья вечером"
    ),
    "tr": (
        "küçük ev nehir kenarında her zaman şarkı söyleyen güzel kadın mutlu çocuklar sabah biz hiç görmedik "
        "yıldızlar dağların üstünde ama şimdi dönmek istiyorlar karanlık orman arkadaşlar"
    ),
    "fi": (
        "pieni talo joen rannalla aina lauloi kaunis nainen iloiset lapset joka aamu emme ole nähneet niin "
        "monta tähteä vuorten yllä mutta nyt he haluavat palata pimeä metsä ystävät yöllä"
    ),
    "hu": (
        "kis ház folyó mellett mindig énekelt szép asszony boldog gyerekek minden reggel nem láttunk ennyi "
        "csillagot hegyek felett de most vissza akarnak menni sötét erdő barátok este"
    ),
    "hi": (
        "छोटा घर नदी के पास हमेशा गाती सुंदर औरत खुश बच्चे हर सुबह हमने इतने तारे नहीं देखे पहाड़ ऊपर लेकिन अब वे "
        "लौटना चाहते हैं अंधेरा जंगल दोस्त शाम पानी"
    ),
    "cmn": (
        "小 房子 河边 总是 唱歌 漂亮 女人 快乐 孩子 每天 早上 我们 没有 看见 这么 多 "
        "星星 山上 但是 现在 他们 想 回家 黑暗 森林 朋友 晚上"
    ),
    "sw": (
        "nyumba ndogo karibu na mto kila siku mwanamke mzuri aliimba watoto wenye furaha asubuhi hatukuona "
        "nyota nyingi juu ya mlima lakini sasa wanataka kurudi msitu giza rafiki jioni maji"
    ),
}
WORDS: dict[str, tuple[str, ...]] = {language: tuple(text.split()) for language, text in _TEXT.items()}

# languages written without spaces between words
UNSPACED = frozenset({"cmn"})

# the classes of the spoken-word task
KEYWORDS: tuple[str, ...] = (
    "water", "music", "seven", "yellow", "garden", "happy", "machine", "family", "window", "silver", "doctor", "police",
)  # fmt: skip
