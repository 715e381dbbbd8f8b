"""Chats with roles and tool calls, as JSON lines: {"messages": [{"role": ..., "content": ...}, ...]}. Written for this purpose,
filled in from a seed, and with passages of the other kinds to talk about."""
import json

from synthetic import CITIES, GOODS, NAMES, WORDS, rows_of

SYSTEM = ("You are a helpful assistant.", "You are a patient tutor. Answer briefly and give an example.",
          "You are a support agent of a shop for household goods. Be polite, never invent order numbers.",
          "You are a careful software engineer. Prefer short answers with code.", "Answer in the language of the question.")
TALK = (
    ("How do I keep bread from going stale?", "Keep it cut side down in a paper bag or a bread box, at room temperature. The fridge makes it stale faster, because starch crystallizes quickest just above freezing. What you will not eat within two days is best sliced and frozen; it goes straight from the freezer into the toaster."),
    ("Can you explain compound interest?", "Compound interest is interest on interest. If you put 1,000 into an account at 5 % a year, you have 1,050 after one year. In the second year you earn 5 % of 1,050, which is 52.50, so you have 1,102.50. After n years it is 1,000 × 1.05^n: about 1,629 after ten years."),
    ("I feel nervous about a talk tomorrow. Any tips?", "That is very common, and a bit of tension even helps. Three things tend to work:\n\n1. Learn the first two sentences by heart. The start is the hardest part.\n2. Say it aloud once tonight, with a clock.\n3. Decide on one message that people should remember, and end with it.\n\nIf you lose the thread, pause, take a sip of water and look at your notes. Nobody minds a pause."),
    ("What's the difference between TCP and UDP?", "**TCP** sets up a connection, numbers bytes, repeats what was lost and delivers everything in order. **UDP** sends single packets and promises nothing.\n\nUse TCP where every byte counts (web pages, mail, files), UDP where late data is worthless (calls, games) or where a protocol brings its own reliability, as QUIC does."),
    ("Write a short poem about autumn rain.", "Grey beads run down the window's edge,\nThe gutter hums, the chestnuts fall,\nA blackbird hides beneath the hedge\nAnd says nothing at all.\n\nThe lamps come on at half past four,\nThe street becomes a second sky;\nI leave my boots beside the door\nAnd hear the evening by."),
    ("Plan a weekend in a city I have never been to, with kids of 6 and 9.", "Here is a plan that leaves room for naps and ice cream:\n\n- **Saturday morning**: the market hall, then a boat or tram ride. Children like things that move.\n- **Saturday afternoon**: a science museum, two hours at most.\n- **Saturday evening**: early dinner near the hotel, a walk.\n- **Sunday morning**: the zoo or a park with a playground.\n- **Sunday noon**: picnic, then home.\n\nTell me the city and the month, and I can make it concrete."),
    ("Why is the sky blue?", "Sunlight holds all colours. Air molecules scatter short waves far more than long ones: the strength goes with one over the fourth power of the wavelength. So blue light reaches us from every direction, while red passes straight through. At sunset the path through the air is long, most of the blue has been scattered away, and red is left."),
    ("¿Me puedes recomendar una receta rápida con garbanzos?", "Claro. Sofríe un diente de ajo y media cebolla en aceite, añade una cucharadita de pimentón, un bote de garbanzos escurridos y dos tomates picados. Deja que se haga ocho minutos, echa un puñado de espinacas y sal. Con un huevo frito encima es una cena completa en un cuarto de hora."),
    ("Kannst du mir erklären, was ein Betriebssystem macht?", "Ein Betriebssystem verteilt die Mittel eines Rechners auf die Programme: Rechenzeit, Speicher, Geräte. Es sorgt dafür, dass Programme einander nicht stören, und bietet ihnen einheitliche Schnittstellen, etwa Dateien statt einzelner Sektoren einer Platte."),
    ("Peux-tu reformuler cette phrase plus poliment : « Envoyez-moi le contrat tout de suite » ?", "Par exemple : « Pourriez-vous, s'il vous plaît, me faire parvenir le contrat dès que possible ? Je vous en remercie par avance. »"),
    ("請問怎麼煮白飯才不會黏鍋？", "米先洗兩三次，泡水二十分鐘。水和米的比例大約一比一點一，大火煮開後轉小火十二分鐘，關火再燜十分鐘，最後用飯匙翻鬆就可以了。"),
    ("Как быстрее выучить таблицу умножения?", "Начните с квадратов и с умножения на 2, 5 и 10, потом заметьте, что порядок множителей не важен: остаётся выучить около двадцати примеров. Повторяйте по пять минут в день, вслух и вразнобой."),
    ("Is it safe to delete the node_modules folder?", "Yes. It holds only what `npm install` downloads, and the lock file says which versions. Delete it with `rm -rf node_modules` and run `npm ci` to get it back. Do not delete `package-lock.json`, which would let versions change."),
    ("What should I look for in a used bicycle?", "Check the frame for cracks near welds, spin both wheels and see that they run true, squeeze the brakes, and lift the chain off the front ring: if it comes off by more than half a tooth, chain and sprockets are worn. Ask for the receipt or the frame number, so that you know it is not stolen."),
    ("Summarize the causes of the French Revolution in three bullet points.", "- **Money**: the crown was bankrupt after wars, and taxes fell on those who had least.\n- **Order**: nobles and clergy kept privileges while an educated middle class had no say.\n- **Hunger and ideas**: bad harvests raised the price of bread just as writers had made people doubt that kings rule by God's will."),
    ("Thanks, that helped. One more thing: how do you spell 'accommodate'?", "A-c-c-o-m-m-o-d-a-t-e: two c's and two m's. A way to remember it: the word is large enough to accommodate both pairs."),
    ("Give me five names for a small bakery.", "1. Crumb & Company\n2. The Early Oven\n3. Rye and Shine\n4. Little Loaf\n5. Flourish"),
    ("How does a vaccine work?", "It shows the immune system a harmless piece or a weakened form of a germ. White blood cells make antibodies against it, and some of them stay as memory cells. When the real germ comes, they recognize it and multiply within days instead of weeks, often before one feels ill."),
    ("My laptop is slow since the last update. What can I do?", "Let us find out what it does first:\n\n1. Open the task manager and sort by CPU, then by memory and disk.\n2. If one program stands out, update or remove it.\n3. If the disk is at 100 % for long, the update may still be indexing; leave it on overnight.\n4. See that at least 15 % of the disk is free.\n\nWhat do you see at the top of the list?"),
    ("Explain recursion to a ten-year-old.", "Imagine you stand in a queue and want to know how many people are before you. You ask the one in front: \"How many are before you?\" She asks the next, and so on. The first one says \"none\". Then the answers come back, each one more than the last. Everybody did the same small job, and the person at the front knew when to stop."),
)
FOLLOW = (("Can you make it shorter?", "In one sentence: {0}"), ("Are you sure?", "Yes. {0}"), ("ok thanks!!", "You're welcome. Is there anything else?"),
          ("Say that again in plain words, please.", "Of course. {0}"))
TOOLS = (
    ("get_weather", "Current weather of a place", {"city": "string", "unit": "celsius or fahrenheit"}),
    ("search_orders", "Finds a customer's orders", {"customer": "string", "status": "string", "limit": "integer"}),
    ("run_sql", "Runs a read-only query", {"query": "string"}),
    ("read_file", "Returns lines of a file", {"path": "string", "first": "integer", "last": "integer"}),
    ("create_event", "Puts an appointment into the calendar", {"title": "string", "start": "ISO 8601", "minutes": "integer", "people": "array of strings"}),
)


def schema(tool):
    name, description, arguments = tool
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {k: {"type": v if " " not in v and v != "ISO" else "string", "description": v} for k, v in arguments.items()},
        "required": list(arguments)[:1]}}}


def call(name, arguments):
    return {"role": "assistant", "content": "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"}


def result(value):
    return {"role": "user", "content": "<tool_response>\n" + json.dumps(value, ensure_ascii=False) + "\n</tool_response>"}


def tool_chat(random):
    tools = random.sample(TOOLS, random.randint(2, 4))
    messages = [{"role": "system", "content": "You may call functions. Available tools:\n<tools>\n" + "\n".join(json.dumps(schema(t)) for t in tools)
                 + "\n</tools>\nCall one with <tool_call>{\"name\": ..., \"arguments\": ...}</tool_call>."}]
    for name, _, _ in tools:
        person, city = random.choice(NAMES), random.choice(CITIES)
        if name == "get_weather":
            degrees = random.randint(-12, 36)
            messages += [{"role": "user", "content": f"Do I need a jacket in {city[0]} today?"}, call(name, {"city": city[0], "unit": "celsius"}),
                         result({"city": city[0], "country": city[1], "temperature": degrees, "wind_kmh": random.randint(0, 70), "sky": random.choice(("clear", "overcast", "rain"))}),
                         {"role": "assistant", "content": f"It is {degrees} °C in {city[0]}, so " + ("yes, take a warm one." if degrees < 12 else "a light one will do." if degrees < 22 else "no.")}]
        elif name == "search_orders":
            title, columns, rows = rows_of(random, random.randint(1, 4))
            while title != "Orders":
                title, columns, rows = rows_of(random, random.randint(1, 4))
            messages += [{"role": "user", "content": f"This is {person}. Where is my {rows[0][1]}?"}, call(name, {"customer": person, "status": "any", "limit": 5}),
                         result([dict(zip(columns, row)) for row in rows]),
                         {"role": "assistant", "content": f"Your {rows[0][1]} is in order {rows[0][0]}, which is marked as \"{rows[0][5]}\". The total was ${rows[0][4]} for {rows[0][2]} piece(s)."}]
        elif name == "run_sql":
            n = random.randint(1, 900)
            messages += [{"role": "user", "content": f"How many {random.choice(GOODS)}s did we ship in {random.choice(('March', 'June', 'October'))}?"},
                         call(name, {"query": f"SELECT COUNT(*) AS n FROM orders WHERE status = 'shipped' AND item LIKE '%{random.choice(GOODS)}%' AND month = {random.randint(1, 12)};"}),
                         result({"columns": ["n"], "rows": [[n]], "ms": random.randint(1, 80)}), {"role": "assistant", "content": f"{n} of them were shipped."}]
        elif name == "read_file":
            path = f"src/{random.choice(WORDS)}/{random.choice(WORDS)}.py"
            function = random.choice(WORDS)
            messages += [{"role": "user", "content": f"What does {path} do at the top?"}, call(name, {"path": path, "first": 1, "last": 12}),
                         result({"path": path, "text": f"import json\n\n\ndef load_{function}(path):\n    with open(path) as file:\n        return json.load(file)\n\n\ndef save_{function}(path, value):\n    with open(path, 'w') as file:\n        json.dump(value, file, indent={random.randint(1, 4)})\n"}),
                         {"role": "assistant", "content": f"It defines two helpers: `load_{function}(path)` reads a JSON file and returns its value, `save_{function}(path, value)` writes one."}]
        else:
            start = f"2024-0{random.randint(4, 9)}-{random.randint(10, 28)}T{random.randint(8, 17):02d}:30:00"
            messages += [{"role": "user", "content": f"Put a call with {person} into my calendar, {start[:10]} at {start[11:16]}, half an hour."},
                         call(name, {"title": f"Call with {person}", "start": start, "minutes": 30, "people": [person]}),
                         result({"id": f"evt_{random.getrandbits(40):010x}", "status": "created"}),
                         {"role": "assistant", "content": f"Done: \"Call with {person}\" on {start[:10]} at {start[11:16]}, 30 minutes."}]
    return messages


def talk_chat(random, questions):
    messages = [{"role": "system", "content": random.choice(SYSTEM)}] if random.random() < 0.6 else []
    for _ in range(random.randint(1, 3)):
        question, answer = questions.pop()
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if random.random() < 0.3:
            ask, reply = random.choice(FOLLOW)
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply.format(answer.split(". ")[0].rstrip(".") + ".")}]
    return messages


def passage_chat(random, kind, text):
    at = random.randrange(max(1, len(text) - 1400))
    at = text.find("\n", at) + 1
    piece = text[at:at + random.randint(500, 1300)].rsplit("\n", 1)[0]
    if kind == "code":
        lines = [line for line in piece.split("\n") if line.strip()]
        return [{"role": "system", "content": SYSTEM[3]}, {"role": "user", "content": "Please review this:\n```\n" + piece + "\n```"},
                {"role": "assistant", "content": f"The excerpt has {len(lines)} lines of code. Two remarks:\n\n1. `{lines[len(lines) // 2].strip()[:70]}` would deserve a comment that says why it is there.\n2. Add a test for what happens with empty input.\n\nOtherwise it reads well."}]
    first = piece.strip().split(". ")[0].strip()
    return [{"role": "user", "content": "Quote the first sentence of this text and tell me how long it is.\n\n" + piece},
            {"role": "assistant", "content": f"The text begins: \"{first}.\" It has {len(piece.split())} words."}]


def chats(random, size, texts):
    """`texts`: kind to text, of which passages are quoted."""
    lines, questions = [], []
    while sum(map(len, lines)) < size:
        if len(questions) < 4:
            questions = random.sample(TALK, len(TALK)) + questions
        form = random.random()
        if form < 0.4 or lines == []:
            messages = talk_chat(random, questions)
        elif form < 0.65:
            messages = tool_chat(random)
        else:
            kind = random.choice(sorted(texts))
            messages = passage_chat(random, kind, texts[kind])
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)
