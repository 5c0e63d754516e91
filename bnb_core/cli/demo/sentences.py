"""The sentences that the encoder is shown, and the queries that are looked up among them."""

from __future__ import annotations

SENTENCES = (
    # The night sky
    "The Moon raises the tides by pulling harder on the near side of the Earth than on the far side.",
    "A comet's tail always points away from the Sun, whichever way the comet is travelling.",
    "Jupiter's four largest moons can be seen with ordinary binoculars on a clear night.",
    "Light from the nearest star beyond the Sun takes more than four years to reach us.",
    "During a total solar eclipse the sky goes dark enough for planets to become visible.",
    # The kitchen
    "Let the dough rest overnight in the refrigerator and the bread will taste better.",
    "Salt the pasta water generously, and keep a cup of it to thin the sauce.",
    "An onion cooked slowly in butter turns sweet and brown after about forty minutes.",
    "Whisk the egg whites until they stand in stiff peaks, then fold in the sugar.",
    "Rinse the rice until the water runs clear, otherwise the grains will stick together.",
    # Railways and bicycles
    "The night train to the coast leaves from platform nine a little before midnight.",
    "Check the tyre pressure and the brakes before every long bicycle ride.",
    "A new tram line will connect the university with the central station next spring.",
    "Freight trains use less fuel for each tonne of goods than lorries do.",
    "The old railway viaduct has been turned into a cycle path with a view over the valley.",
    # Programming
    "The program crashed because two threads changed the same list at the same time.",
    "Write a failing test first, and only then correct the error.",
    "A hash table finds an entry in constant time on average, whatever the number of entries.",
    "The server ran out of memory when a log file was read as a whole instead of line by line.",
    "Floating-point addition is not associative, so the order of a sum changes its result.",
    # Health
    "Wash the wound with clean water and cover it with a sterile dressing.",
    "Adults who sleep less than six hours a night catch colds more often.",
    "A brisk walk of half an hour a day lowers the blood pressure noticeably.",
    "The vaccine is given twice, with at least four weeks between the injections.",
    "Drink plenty of water and rest in the shade if you feel dizzy in the heat.",
    # Music
    "The cello sounds an octave below the viola and is held between the knees.",
    "She practised the slow movement of the sonata until her neighbours complained.",
    "A drummer who rushes makes the whole band play faster than it should.",
    "The choir rehearses on Thursdays and sings two concerts every winter.",
    "Tune the lowest string first, then check the others against it.",
)

QUERIES = (
    "Why does the sea rise and fall twice a day?",
    "How far away are the stars?",
    "What can I do to make my homemade bread better?",
    "Is it better for the climate to send goods by rail?",
    "My software fails when it runs in parallel.",
    "How do I treat a cut on my hand?",
    "Does exercise help against hypertension?",
    "How is a guitar tuned?",
)
