// What texts of tests are made of, from a seed: numbers, words, names. The same seed gives the same everywhere; the
// standard library's distributions and its shuffle differ between implementations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace thimble {

class Generator {
public:
  explicit Generator(uint64_t seed) : random_(seed) {}

  size_t below(size_t n) { return random_() % n; }
  double share() { return double(random_() >> 11) * 0x1p-53; }  // in [0, 1)
  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[below(i)]);
  }
  template <typename T>
  const T& one_of(const std::vector<T>& items) {
    return items[below(items.size())];
  }

  /// Ten numbers of `n_digits` digits that differ from one another in every place, so that guessing has a chance of a
  /// tenth there.
  std::vector<std::string> ten_numbers(int n_digits);
  std::string number(int n_digits);
  std::string hex(int n_digits);
  /// 32 hexadecimal digits in groups, as UUIDs are written.
  std::string uuid();
  /// A word that no language has, of `n_syllables`.
  std::string word(int n_syllables);
  /// Uppercase letters.
  std::string letters(int n);
  /// `n` different ones that `make` makes.
  template <typename F>
  std::vector<std::string> different(size_t n, const F& make);

private:
  std::mt19937_64 random_;
};

/// Pairs like "dusty anchor", in the generator's order.
std::vector<std::string> key_names(Generator& random);
/// The i-th key: beyond the pairs, they go on as "dusty anchor of Borake".
std::string key_name(const std::vector<std::string>& pairs, size_t i, Generator& random);

/// Names of people, "Mira Tolland", in the generator's order; some ten thousand.
std::vector<std::string> people(Generator& random);
/// Names of towns, "Halbeck", in the generator's order; some hundreds.
std::vector<std::string> towns(Generator& random);

template <typename F>
std::vector<std::string> Generator::different(size_t n, const F& make) {
  std::vector<std::string> made;
  while (made.size() < n) {
    std::string next = make();
    bool is_new = true;
    for (const std::string& other : made) is_new = is_new && other != next;
    if (is_new) made.push_back(std::move(next));
  }
  return made;
}

}  // namespace thimble
