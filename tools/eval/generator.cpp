#include "eval/generator.h"

namespace thimble {
namespace {

const char* const kAdjectives[] = {"brave", "calm",   "dusty", "eager", "frozen", "gentle", "hollow", "humble",
                                   "lazy",  "loud",   "merry", "noisy", "orange", "polite", "quiet",  "rusty",
                                   "shiny", "silent", "sour",  "sunny", "tall",   "tiny",   "warm",   "wild"};
const char* const kNouns[] = {"anchor", "apple",  "bridge", "candle", "castle", "dragon", "engine", "feather",
                              "garden", "hammer", "island", "jacket", "kettle", "ladder", "magnet", "mirror",
                              "needle", "ocean",  "parrot", "pencil", "rabbit", "saddle", "temple", "violin"};
const char* const kFirstNames[] = {"Ada",  "Anna",  "Boris", "Carl", "Clara", "David", "Edith",  "Elena",
                                   "Emil", "Felix", "Frida", "Hugo", "Ivan",  "Jonas", "Julia",  "Karin",
                                   "Leo",  "Lydia", "Marta", "Mira", "Nils",  "Nora",  "Oscar",  "Paula",
                                   "Rosa", "Simon", "Sofia", "Tom",  "Ursa",  "Vera",  "Walter", "Yusuf"};
const char* const kBeginnings[] = {"Al",  "Bar", "Bel", "Cor", "Dun", "Els", "Fal",  "Gar",  "Hal", "Ing",
                                   "Jor", "Kel", "Lan", "Mal", "Nor", "Ost", "Pel",  "Quin", "Ros", "Sel",
                                   "Tol", "Ul",  "Van", "Wes", "Yar", "Zel", "Bram", "Cal",  "Dor", "Fen"};
const char* const kNameEnds[] = {"berg", "dahl", "der",  "end",  "ett",   "feld", "gren", "held", "kin",   "land",
                                 "ling", "lund", "mann", "mond", "quist", "ro",   "sen",  "son",  "strom", "wood"};
const char* const kTownEnds[] = {"beck",  "bridge", "burg",  "bury", "by",    "cester", "dale",
                                 "field", "ford",   "gate",  "ham",  "haven", "mere",   "minster",
                                 "mouth", "port",   "stead", "ton",  "wick",  "worth"};
const char kConsonants[] = "bdfghklmnprstvz", kVowels[] = "aeiou";

template <size_t A, size_t B>
std::vector<std::string> pairs(const char* const (&first)[A], const char* const (&second)[B], const char* between) {
  std::vector<std::string> all;
  for (const char* a : first) {
    for (const char* b : second) all.push_back(std::string(a) + between + b);
  }
  return all;
}

}  // namespace

std::vector<std::string> Generator::ten_numbers(int n_digits) {
  std::vector<std::string> numbers(10);
  for (int place = 0; place < n_digits; place++) {
    std::vector<char> digits = {'0', '1', '2', '3', '4', '5', '6', '7', '8', '9'};
    shuffle(digits);
    for (size_t i = 0; i < numbers.size(); i++) numbers[i] += digits[i];
  }
  return numbers;
}

std::string Generator::number(int n_digits) {
  std::string text;
  for (int i = 0; i < n_digits; i++) text += char('0' + below(10));
  return text;
}

std::string Generator::hex(int n_digits) {
  std::string text;
  for (int i = 0; i < n_digits; i++) text += "0123456789abcdef"[below(16)];
  return text;
}

std::string Generator::uuid() {
  std::string text = hex(8);
  for (int n : {4, 4, 4, 12}) text += "-" + hex(n);
  return text;
}

std::string Generator::word(int n_syllables) {
  std::string text;
  for (int i = 0; i < n_syllables; i++) {
    text += kConsonants[below(sizeof kConsonants - 1)];
    text += kVowels[below(sizeof kVowels - 1)];
  }
  return text;
}

std::string Generator::letters(int n) {
  std::string text;
  for (int i = 0; i < n; i++) text += char('A' + below(26));
  return text;
}

std::vector<std::string> key_names(Generator& random) {
  std::vector<std::string> names = pairs(kAdjectives, kNouns, " ");
  random.shuffle(names);
  return names;
}

std::string key_name(const std::vector<std::string>& pairs, size_t i, Generator& random) {
  const std::string& pair = pairs[i % pairs.size()];
  if (i < pairs.size()) return pair;
  std::string place = random.word(3);
  place[0] = char(place[0] - 'a' + 'A');
  return pair + " of " + place;
}

std::vector<std::string> people(Generator& random) {
  std::vector<std::string> names;
  const std::vector<std::string> surnames = pairs(kBeginnings, kNameEnds, "");
  for (const char* first : kFirstNames) {
    for (const std::string& surname : surnames) names.push_back(std::string(first) + " " + surname);
  }
  random.shuffle(names);
  return names;
}

std::vector<std::string> towns(Generator& random) {
  std::vector<std::string> names = pairs(kBeginnings, kTownEnds, "");
  random.shuffle(names);
  return names;
}

}  // namespace thimble
