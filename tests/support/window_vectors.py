#!/usr/bin/env python3
"""Writes tests/data/window_vectors.txt: scripts of batches and the cells that are exact while each is attended to, by a plain
model of src/cache/window.h. Every implementation of the window is held to them.

A line is one of
  case NAME LAST POOL SPARE SLOTS CELLS STREAMS   a cache that is empty; SLOTS of a stream, CELLS of a stream
  write CELL:SEQUENCE:IMPORTANCE ...              a batch; each token sees its sequence's cells of lower or its own position
  exact CELL ...                                  all that is exact while that batch is attended to
  arrive CELL:SEQUENCE:IMPORTANCE ...             rows of a saved state, of one sequence
  remove SEQUENCE FIRST END                       its positions [FIRST, END) are no more
Of two cells the one of greater importance matters more to every query.
"""
import os, random


class Model:
    def __init__(self, last, pool, spare, slots, cells, streams):
        self.last, self.pool, self.spare, self.slots, self.cells = last, pool, spare, slots, cells
        self.exact = {}      # cell: [order, number of the sequence that saw it last]
        self.owner = {}      # cell: (sequence, position)
        self.importance = {}
        self.length = {}
        self.order = self.number = 0
        self.waits = {}      # stream: the greatest order before its last batch, where cells wait for the next

    def own(self, cell, sequence, importance):
        position = self.length.get(sequence, 0)
        self.length[sequence] = position + 1
        self.owner[cell], self.importance[cell] = (sequence, position), importance

    def sees(self, token, cell):
        mine, other = self.owner[token], self.owner.get(cell)
        return other is not None and other[0] == mine[0] and other[1] <= mine[1]

    def sequences(self, batch, cells):
        """Cells of each sequence of a batch, and its number; a cell that two see is the later one's."""
        found, taken = [], set()
        for token in reversed(batch):
            if token in taken:
                continue
            members = [c for c in cells if self.sees(token, c)]
            taken |= set(members)
            self.number += 1
            found.append((self.number, members))
        return found

    def stays(self, orders, n_new, judged):
        """Of cells {cell: order} that are too many, those that stay."""
        line = sorted(orders, key=orders.get)
        end = self.last + self.pool + self.spare + 1 if n_new <= self.spare else len(line)
        others = line[:end - self.last]
        rank = (lambda c: (-self.importance[c], orders[c])) if judged else orders.get
        return set(line[end - self.last:]) | set(sorted(others, key=rank)[:self.pool])

    def write(self, tokens):
        total, batch = self.last + self.pool + self.spare, [t[0] for t in tokens]
        overwritten = {self.exact.pop(c)[1] for c in batch if c in self.exact}
        for token in tokens:
            self.own(*token)
        streams = {c // self.cells for c in batch}
        if streams & set(self.waits):
            for _, members in self.sequences(batch, batch + list(self.exact)):
                mine = {c: self.exact[c][0] for c in members if c in self.exact}
                before = self.waits.get(members[0] // self.cells)
                if before is not None and len(mine) > total:
                    anchor = sorted(mine, key=mine.get)[total]
                    for c in set(mine) - self.stays(mine, 0, mine[anchor] > before):
                        del self.exact[c]
        shown = sorted(list(self.exact) + batch)
        # The end of the batch.
        orders = {c: e[0] for c, e in self.exact.items()}
        orders.update({c: self.order + 1 + i for i, c in enumerate(batch)})
        before, self.order = self.order, self.order + len(batch)
        self.waits = {s: b for s, b in self.waits.items() if s not in streams}
        kept, seen = set(), {}
        for number, members in self.sequences(batch, list(orders)):
            n_new = len(set(members) & set(batch))
            mine = {c: orders[c] for c in members}
            # A sequence's first token of a batch is no draft: what leaves with it need not wait.
            most = total + self.spare if 1 < n_new <= self.spare and len(mine) - n_new < total else total
            kept |= set(mine) if len(mine) <= most else self.stays(mine, n_new, True)
            if most > total and len(mine) > total:
                self.waits[members[0] // self.cells] = before
            seen.update({c: number for c in members})
        for c in list(self.exact):
            if c in seen:
                self.exact[c][1] = seen[c]
                if c not in kept:
                    del self.exact[c]
            elif self.exact[c][1] in overwritten:
                self.exact[c][1] = 0
        self.make_room([c for c in batch if c in kept], set(seen))
        for c in batch:
            if c in kept:
                self.exact[c] = [orders[c], seen[c]]
        return shown

    def make_room(self, arriving, seen):
        for stream in sorted({c // self.cells for c in arriving}):
            mine = [c for c in self.exact if c // self.cells == stream]
            missing = len(mine) + sum(c // self.cells == stream for c in arriving) - self.slots
            if missing <= 0:
                continue
            missing = max(missing, self.spare)
            line = sorted((c for c in mine if c not in seen), key=lambda c: (self.exact[c][1], self.exact[c][0]))
            groups = {}
            for c in line:
                groups.setdefault(self.exact[c][1], []).append(c)
            leave = list(groups.get(0, []))
            leave += [c for cells in groups.values() for c in cells[self.pool:]] + line
            for c in list(dict.fromkeys(leave))[:missing]:
                del self.exact[c]

    def arrive(self, tokens):
        self.number += 1
        number = self.number
        for token in tokens:
            cell = token[0]
            self.own(*token)
            self.exact.pop(cell, None)
            self.order += 1
            mine = {c: e[0] for c, e in self.exact.items() if e[1] == number}
            mine[cell] = self.order
            if len(mine) > self.last + self.pool + 2 * self.spare:
                for c in set(mine) - self.stays(mine, 0, False):
                    self.exact.pop(c, None)
            self.make_room([cell], {c for c, e in self.exact.items() if e[1] == number})
            self.exact[cell] = [self.order, number]

    def remove(self, sequence, first, end):
        self.owner = {c: o for c, o in self.owner.items() if not (o[0] == sequence and first <= o[1] < end)}
        if end >= self.length.get(sequence, 0):
            self.length[sequence] = min(first, self.length.get(sequence, 0))


class Script:
    """`ages`: of two cells the older matters more, which is what there is without a judge."""

    def __init__(self, name, last, pool, spare, slots, cells, streams=1, ages=False):
        self.ages, self.age = ages, 0
        self.model, self.random = Model(last, pool, spare, slots, cells, streams), random.Random(name)
        self.cells = cells
        self.lines = [f"case {name} {last} {pool} {spare} {slots} {cells} {streams}"]

    def place(self, sequences, stream=0, scattered=False):
        free = [c for c in range(stream * self.cells, (stream + 1) * self.cells) if c not in self.model.owner]
        if scattered:
            self.random.shuffle(free)
        importances = self.random.sample(range(100000), len(sequences))
        if self.ages:
            importances = [1000000 - self.age - i for i in range(len(sequences))]
            self.age += len(sequences)
        return [(c, s, i) for c, s, i in zip(free, sequences, importances)]

    def say(self, word, tokens):
        self.lines.append(word + "".join(f" {c}:{s}:{i}" for c, s, i in tokens))

    def write(self, *sequences, **where):
        tokens = self.place(sequences, **where)
        self.say("write", tokens)
        self.lines.append("exact" + "".join(f" {c}" for c in self.model.write(tokens)))

    def arrive(self, sequence, n, **where):
        tokens = self.place([sequence] * n, **where)
        self.say("arrive", tokens)
        self.model.arrive(tokens)

    def remove(self, sequence, first=0, end=1 << 30):
        self.lines.append(f"remove {sequence} {first} {end}")
        self.model.remove(sequence, first, end)


def scripts(suffix, **how):
    s = Script("one_sequence" + suffix, 10, 4, 3, 20, 64, **how)
    for _ in range(50):
        s.write(0)
    yield s
    s = Script("scattered_cells" + suffix, 10, 4, 3, 20, 96, **how)
    for _ in range(60):
        s.write(0, scattered=True)
    yield s
    s = Script("sequences_of_one_stream" + suffix, 6, 3, 2, 60, 256, **how)
    for step in range(40):
        s.write(*([0, 1, 2, 3] if step % 3 else [step % 4]))
    yield s
    s = Script("drafts" + suffix, 8, 3, 4, 19, 128, **how)
    s.write(*[0] * 12)
    for n, wrong in [(4, 0), (3, 2), (4, 3), (2, 1), (1, 0), (4, 1), (4, 2), (3, 0), (1, 0), (1, 0), (4, 3), (4, 3), (1, 0)]:
        s.write(*[0] * n)
        length = s.model.length[0]
        s.remove(0, length - wrong, length)
    s.write(0)
    yield s
    s = Script("prompts" + suffix, 8, 3, 4, 60, 256, **how)
    for sequence, n in [(0, 30), (1, 50), (0, 1), (1, 1), (0, 20), (2, 40)]:
        s.write(*[sequence] * n)
    s.write(0, 1, 2)
    yield s
    s = Script("idle_ones_give_way" + suffix, 6, 3, 2, 26, 256, **how)
    for sequence in [0, 1, 2, 3, 4]:
        s.write(*[sequence] * 20)
        for _ in range(5):
            s.write(sequence)
    for _ in range(4):
        s.write(0)
    yield s
    s = Script("removed_and_written_over" + suffix, 6, 3, 2, 26, 64, **how)
    for sequence in range(6):
        for _ in range(18 - 2 * (sequence % 3)):
            s.write(sequence)
        s.remove(sequence)
    yield s
    s = Script("loaded_states" + suffix, 6, 3, 2, 26, 128, **how)
    s.arrive(0, 30)
    s.arrive(1, 9, scattered=True)
    for _ in range(8):
        s.write(0)
        s.write(1)
    s.write(0, 1)
    yield s
    s = Script("streams" + suffix, 6, 3, 2, 13, 64, 2, **how)
    for step in range(30):
        s.write(step % 3, stream=step % 3 % 2)
    yield s


tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(tests, "data", "window_vectors.txt"), "w") as out:
    for script in [*scripts(""), *scripts("_oldest_first", ages=True)]:
        out.write("\n".join(script.lines) + "\n")
