"""Tables, logs and mathematics from templates and a seed: `tables`, `logs` and `mathematics` return a text of about `size`
characters."""
import json
from datetime import datetime, timedelta

NAMES = ("Amara Osei", "Lena Fischer", "Kenji Watanabe", "Priya Raman", "Tomás Rivera", "Ingrid Solberg", "Wei Zhang",
         "Fatima Haddad", "Marek Nowak", "Chloé Laurent", "Dmitri Orlov", "Grace Mwangi", "Noah Bennett", "Yuki Sato")
CITIES = (("Lisbon", "PT", 38.72, -9.14), ("Osaka", "JP", 34.69, 135.5), ("Nairobi", "KE", -1.29, 36.82),
          ("Tromsø", "NO", 69.65, 18.96), ("Quito", "EC", -0.18, -78.47), ("Hanoi", "VN", 21.03, 105.85),
          ("Winnipeg", "CA", 49.9, -97.14), ("Perth", "AU", -31.95, 115.86), ("Tbilisi", "GE", 41.72, 44.79))
GOODS = ("oak shelf", "desk lamp", "kettle", "garden hose", "wool blanket", "bicycle pump", "paint brush set", "steel thermos",
         "rain jacket", "chess board", "headphones", "cast-iron pan", "notebook A5", "water filter", "folding chair")
WORDS = "amber basin cedar delta ember fjord grove harbor inlet juniper kelp ledge meadow north orchid prairie quartz ridge".split()
START = datetime(2024, 3, 1, 6, 30)


def filled(parts, size):
    text = ""
    while len(text) < size:
        text += next(parts)
    return text


def rows_of(random, n):
    """Rows of one of several tables: (title, columns, rows)."""
    kind = random.randrange(4)
    if kind == 0:
        rows = []
        for i in range(n):
            quantity, price = random.randint(1, 40), random.randint(199, 18999) / 100
            rows.append((10000 + random.randrange(90000), random.choice(GOODS), quantity, f"{price:.2f}", f"{price * quantity:.2f}",
                         random.choice(("shipped", "open", "returned", "paid"))))
        return "Orders", ("order", "item", "quantity", "unit price", "total", "status"), rows
    if kind == 1:
        rows = []
        for i in range(n):
            city = random.choice(CITIES)
            rows.append((city[0], city[1], f"{city[2]:.2f}", f"{city[3]:.2f}", (START + timedelta(days=i)).date().isoformat(),
                         f"{random.gauss(14, 8):.1f}", f"{max(0, random.gauss(2, 4)):.1f}"))
        return "Weather", ("city", "country", "latitude", "longitude", "date", "mean °C", "rain mm"), rows
    if kind == 2:
        rows = [(name, random.choice(("sales", "research", "support", "finance")), random.randint(1, 12), random.randint(31, 99) * 1000,
                 f"{random.random() * 100:.1f}%") for name in random.sample(NAMES, min(n, len(NAMES)))]
        return "Staff", ("name", "department", "years", "salary", "utilization"), rows
    rows = [(f"{random.choice(WORDS)}-{random.randrange(100):02d}", random.choice(("x86_64", "aarch64")), random.choice((8, 16, 32, 64)),
             random.choice((32, 64, 128, 256)), f"{random.random() * 100:.1f}", f"{random.expovariate(1 / 40):.2f}",
             random.choice(("up", "up", "up", "draining", "down"))) for _ in range(n)]
    return "Machines", ("host", "arch", "cores", "GiB", "cpu %", "p99 ms", "state"), rows


def tables(random, size):
    def parts():
        while True:
            title, columns, rows = rows_of(random, random.randint(6, 24))
            form = random.randrange(6)
            text = [f"{'#' * random.randint(1, 3)} {title}, {random.choice(WORDS)} {random.randint(1, 400)}", ""]
            if form == 0:
                text += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
                text += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
            elif form == 1:
                separator = random.choice((",", ";", "\t"))
                text += [separator.join(columns)] + [separator.join(map(str, row)) for row in rows]
            elif form == 2:
                text.append(json.dumps([dict(zip(columns, row)) for row in rows], indent=random.choice((None, 2)), ensure_ascii=False))
            elif form == 3:
                widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
                text += ["  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip() for row in [columns, tuple("-" * w for w in widths), *rows]]
            elif form == 4:
                text.append("<table>\n  <tr>" + "".join(f"<th>{c}</th>" for c in columns) + "</tr>")
                text += ["  <tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in rows[:10]] + ["</table>"]
            else:
                name = title.lower()
                for row in rows:
                    values = ", ".join(str(x) if isinstance(x, int) else "'" + str(x) + "'" for x in row)
                    text.append(f"INSERT INTO {name} ({', '.join(c.replace(' ', '_') for c in columns)}) VALUES ({values});")
            yield "\n".join(text) + "\n\n"
    return filled(parts(), size)


def log_block(random, now):
    address = lambda: ".".join(str(random.randint(1, 254)) for _ in range(4))
    form = random.randrange(5)
    lines = []
    for _ in range(random.randint(8, 30)):
        now += timedelta(seconds=random.expovariate(1 / 7))
        host, pid = random.choice(WORDS), random.randint(300, 32000)
        if form == 0:
            what = random.choice((
                f"sshd[{pid}]: Accepted publickey for {host} from {address()} port {random.randint(1024, 65535)} ssh2: ED25519 SHA256:{random.getrandbits(128):032x}",
                f"sshd[{pid}]: Failed password for invalid user {host} from {address()} port {random.randint(1024, 65535)} ssh2",
                f"systemd[1]: Started {host}.service - {host.title()} synchronization daemon.",
                f"kernel: [{random.random() * 1e5:.6f}] eth0: link up, 1000 Mbps, full duplex, lpa 0x{random.getrandbits(16):04X}",
                f"CRON[{pid}]: (root) CMD (test -x /usr/sbin/{host} && /usr/sbin/{host} --daily)"))
            lines.append(f"{now:%b %d %H:%M:%S} {random.choice(WORDS)}-{random.randint(1, 9)} {what}")
        elif form == 1:
            path = "/" + "/".join(random.choice(WORDS) for _ in range(random.randint(1, 4)))
            lines.append(f'{address()} - - [{now:%d/%b/%Y:%H:%M:%S} +0000] "{random.choice(("GET", "GET", "POST", "PUT"))} {path}?id={random.randrange(10**5)} HTTP/1.1" '
                         f'{random.choice((200, 200, 200, 304, 404, 500))} {random.randrange(60000)} "-" "Mozilla/5.0 (X11; Linux x86_64)"')
        elif form == 2:
            lines.append(json.dumps({"time": now.isoformat(timespec="milliseconds") + "Z", "level": random.choice(("info", "warn", "debug", "error")),
                                     "service": host, "trace": f"{random.getrandbits(64):016x}", "ms": round(random.expovariate(0.02), 2),
                                     "message": random.choice(("request served", "cache miss", "retrying upstream", "connection reset by peer", "lease renewed"))}))
        elif form == 3:
            level = random.choice(("INFO ", "INFO ", "WARN ", "ERROR"))
            lines.append(f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d} {level} [worker-{random.randint(1, 16)}] com.example.{host}.{random.choice(WORDS).title()}Service - "
                         + random.choice((f"Processed batch {random.randrange(10**6)} of {random.randint(1, 500)} records in {random.randint(3, 9000)} ms",
                                          f"Queue depth {random.randint(0, 900)} exceeds threshold {random.randint(100, 500)}",
                                          f"Could not parse field '{random.choice(WORDS)}' at offset {random.randint(0, 4000)}")))
            if level == "ERROR":
                lines.append(f"java.lang.IllegalStateException: no session for {host}")
                lines += [f"\tat com.example.{host}.{random.choice(WORDS).title()}.{random.choice(WORDS)}({random.choice(WORDS).title()}.java:{random.randint(10, 900)})" for _ in range(random.randint(2, 6))]
        else:
            lines.append(random.choice((
                f"[{random.randint(1, 99)}/99] Building CXX object src/{host}/CMakeFiles/{host}.dir/{random.choice(WORDS)}.cpp.o",
                f"src/{host}/{random.choice(WORDS)}.cpp:{random.randint(1, 800)}:{random.randint(1, 90)}: warning: unused variable '{random.choice(WORDS)}' [-Wunused-variable]",
                f"ok {random.randint(1, 400)} - {host} handles {random.choice(WORDS)} input ({random.randint(1, 900)} ms)",
                f"Get:{random.randint(1, 60)} http://deb.example.org stable/main amd64 lib{host}{random.randint(1, 9)} amd64 {random.randint(0, 9)}.{random.randint(0, 30)}.{random.randint(0, 9)}-1 [{random.randint(10, 900)} kB]")))
    return "\n".join(lines) + "\n\n", now


def logs(random, size):
    def parts():
        now = START
        while True:
            text, now = log_block(random, now + timedelta(hours=random.random() * 9))
            yield text
    return filled(parts(), size)


def polynomial(random, degree):
    return [random.choice((-1, 1)) * random.randint(1, 9) for _ in range(degree + 1)]


def show(coefficients, x="x"):
    terms = []
    for power, c in reversed(list(enumerate(coefficients))):
        factor = "" if abs(c) == 1 and power else str(abs(c))
        terms.append(("- " if c < 0 else "+ ") + factor + ("" if power == 0 else x if power == 1 else f"{x}^{{{power}}}"))
    return " ".join(terms).removeprefix("+ ").replace("- ", "-", 1) if terms[0].startswith("-") else " ".join(terms).removeprefix("+ ")


def problem(random):
    form = random.randrange(7)
    if form == 0:
        p = polynomial(random, random.randint(2, 4))
        derivative = [i * c for i, c in enumerate(p)][1:]
        at = random.randint(-3, 4)
        value = sum(c * at**i for i, c in enumerate(derivative))
        return (f"\\textbf{{Problem.}} Let $f(x) = {show(p)}$. Find $f'({at})$.\n\n\\textbf{{Solution.}} The power rule gives "
                f"$$f'(x) = {show(derivative)},$$ and at $x = {at}$ this is ${value}$. \\qed\n\n")
    if form == 1:
        r, s = random.randint(-9, 9), random.randint(-9, 9)
        return (f"Solve $x^2 {-(r + s):+d}x {r * s:+d} = 0$.\n\nWe look for two numbers with sum ${r + s}$ and product ${r * s}$: they are ${r}$ and ${s}$. "
                f"Hence $(x - ({r}))(x - ({s})) = 0$, so $x \\in \\{{{r}, {s}\\}}$.\n\n")
    if form == 2:
        a, b = random.randint(12, 999), random.randint(12, 999)
        steps, x, y = [], a, b
        while y:
            steps.append(f"{x} &= {x // y} \\cdot {y} + {x % y}")
            x, y = y, x % y
        return f"The greatest common divisor of {a} and {b}, by Euclid's algorithm:\n\\begin{{align*}}\n" + " \\\\\n".join(steps) + f"\n\\end{{align*}}\nso $\\gcd({a}, {b}) = {x}$.\n\n"
    if form == 3:
        m = [[random.randint(-5, 6) for _ in range(2)] for _ in range(2)]
        det = m[0][0] * m[1][1] - m[0][1] * m[1][0]
        rows = " \\\\ ".join(" & ".join(map(str, r)) for r in m)
        return (f"For $A = \\begin{{pmatrix}} {rows} \\end{{pmatrix}}$ we have $\\det A = {m[0][0]}\\cdot({m[1][1]}) - ({m[0][1]})\\cdot({m[1][0]}) = {det}$ and "
                f"$\\operatorname{{tr}} A = {m[0][0] + m[1][1]}$, so its characteristic polynomial is $\\lambda^2 {-(m[0][0] + m[1][1]):+d}\\lambda {det:+d}$"
                + (", and $A$ is invertible.\n\n" if det else ", and $A$ is singular.\n\n"))
    if form == 4:
        n, k = random.randint(3, 12), random.randint(2, 5)
        return (f"\\begin{{theorem}} For all $n \\ge 1$, $$\\sum_{{i=1}}^{{n}} ({k}i {n:+d}) = \\frac{{n({k}n + {k + 2 * n})}}{{2}}.$$ \\end{{theorem}}\n"
                f"\\begin{{proof}} By induction. For $n = 1$ both sides are ${k + n}$. If the claim holds for $n$, add ${k}(n+1) {n:+d}$ to both sides and collect the terms in $n^2$, $n$ and $1$. \\end{{proof}}\n\n")
    if form == 5:
        name, other = random.sample(NAMES, 2)
        goods, price, n, off = random.choice(GOODS), random.randint(3, 60), random.randint(2, 15), random.choice((5, 10, 15, 20, 25))
        total = price * n
        return (f"{name.split()[0]} buys {n} of the {goods} at ${price} each and gets {off}% off. How much does {other.split()[0]} owe for half of it?\n"
                f"Step 1: {n} * {price} = {total}.\nStep 2: {off}% of {total} is {total * off / 100:.2f}, which leaves {total * (100 - off) / 100:.2f}.\n"
                f"Step 3: half of that is {total * (100 - off) / 200:.2f}.\nAnswer: ${total * (100 - off) / 200:.2f}\n\n")
    values = [round(random.gauss(random.randint(5, 60), 6), 1) for _ in range(random.randint(5, 9))]
    mean = sum(values) / len(values)
    variance = sum((v - mean)**2 for v in values) / (len(values) - 1)
    return (f"Sample: {', '.join(map(str, values))}. Mean x̄ = {mean:.3f}; s² = Σ(xᵢ − x̄)²/(n − 1) = {variance:.3f}; s ≈ {variance**0.5:.3f}; "
            f"standard error s/√n ≈ {(variance / len(values))**0.5:.3f}. With t ≈ 2.3 the 95% interval is [{mean - 2.3 * (variance / len(values))**0.5:.2f}, {mean + 2.3 * (variance / len(values))**0.5:.2f}].\n\n")


def mathematics(random, size):
    def parts():
        n = 0
        while True:
            n += 1
            yield (f"\\section*{{Exercise {n}}}\n" if n % 5 == 1 else f"{n}. ") + problem(random)
    return filled(parts(), size)
