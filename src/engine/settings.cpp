#include "engine/settings.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <iterator>
#include <set>
#include <stdexcept>

#include "codec/format.h"

namespace thimble {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::invalid_argument(what);
}

int parse_int(const std::string& key, const std::string& text, int low, int high) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    fail(key + "=" + text + " must be a whole number from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

constexpr const char* kRates[] = {"4", "3", "2", "1.5", "1.25", "1"};  // that code

double parse_bits(const std::string& text) {
  if (text == "f16" || text == "16") return 16;
  for (const char* rate : kRates) {
    if (text == rate) return std::strtod(rate, nullptr);
  }
  fail("bits=" + text + " is not one of 16, 4, 3, 2, 1.5, 1.25, 1");
}

// "4+2+1"
std::vector<double> parse_rates(const std::string& text) {
  std::vector<double> rates;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('+', begin), text.size());
    const std::string rate = text.substr(begin, end - begin);
    const auto known = std::find(std::begin(kRates), std::end(kRates), rate);
    if (known == std::end(kRates)) {
      std::string what = "rates=";
      fail(what.append(text).append(": '").append(rate).append("' is not one of 4, 3, 2, 1.5, 1.25, 1"));
    }
    rates.push_back(std::strtod(*known, nullptr));
    begin = end + 1;
  }
  const std::set<double> different(rates.begin(), rates.end());
  if (different.size() != rates.size()) fail("rates=" + text + " names a rate twice");
  return rates;
}

constexpr std::initializer_list<const char*> kPolicies = {"auto", "all", "none"};
constexpr std::initializer_list<const char*> kStores = {"auto", "ram", "file", "pinned"};

// The index of a value among the words that are allowed.
int choose(const std::string& key, const std::string& value, std::initializer_list<const char*> words) {
  std::string known;
  for (const char* const* word = words.begin(); word != words.end(); word++) {
    if (value == *word) return int(word - words.begin());
    known += std::string(known.empty() ? "" : ", ") + *word;
  }
  fail(key + "=" + value + " is not one of " + known);
}

std::string number(double value) {
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text;
}

Settings parse_items(const std::string& text) {
  Settings s;
  std::set<std::string> given;
  for (size_t begin = 0; !text.empty() && begin <= text.size();) {  // an item after a last comma too
    size_t end = text.find(',', begin);
    if (end == std::string::npos) end = text.size();
    const std::string item = text.substr(begin, end - begin);
    begin = end + 1;
    const size_t equals = item.find('=');
    if (equals == std::string::npos) fail("'" + item + "' is not of the form key=value");
    const std::string key = item.substr(0, equals), value = item.substr(equals + 1);
    if (!given.insert(key).second) fail("key '" + key + "' is given twice");
    if (key == "bits") {
      const size_t slash = value.find('/');
      s.key_bits = parse_bits(value.substr(0, slash));
      s.value_bits = slash == std::string::npos ? s.key_bits : parse_bits(value.substr(slash + 1));
    } else if (key == "window") {
      s.window.last = parse_int(key, value, 0, 65536);
    } else if (key == "pool") {
      s.window.pool = parse_int(key, value, 0, 65536);
    } else if (key == "small") {
      s.small_cells = parse_int(key, value, 0, 1 << 30);
    } else if (key == "profile") {
      if (value.empty()) fail("profile= needs a path");
      s.profile = value;
    } else if (key == "device") {
      if (value.empty()) fail("device= needs the name of a ggml device, such as CPU");
      s.device = value;
    } else if (key == "top") {
      s.top = parse_int(key, value, 0, 65536);
    } else if (key == "store") {
      s.store = Settings::Store(choose(key, value, kStores));
    } else if (key == "path") {
      if (value.empty()) fail("path= needs a directory");
      s.path = value;
    } else if (key == "tail") {
      s.drop_tail = choose(key, value, {"quantized", "drop"}) == 1;
    } else if (key == "policy") {
      s.policy = Settings::Policy(choose(key, value, kPolicies));
    } else if (key == "calibrate") {
      if (value.empty()) fail("calibrate= needs the path of the profile to write");
      s.calibrate.path = value;
    } else if (key == "tokens") {
      s.calibrate.tokens = parse_int(key, value, 1, 1 << 30);
    } else if (key == "context") {
      s.calibrate.context = parse_int(key, value, 1, 1 << 30);
    } else if (key == "rates") {
      s.calibrate.rates = parse_rates(value);
    } else if (key == "even") {
      s.calibrate.even = choose(key, value, {"no", "yes"}) == 1;
    } else {
      fail(
          "unknown key '" + key +
          "'; known are bits, window, pool, small, profile, device, top, store, path, tail, policy, calibrate, tokens, "
          "context, rates, even");
    }
  }
  for (const char* key : {"tokens", "context", "rates", "even"}) {
    if (given.count(key) && !s.calibrates()) fail(std::string(key) + "= has no meaning without calibrate=");
  }
  if (s.calibrates()) {
    if (!given.count("bits")) s.key_bits = s.value_bits = 16;
    if (!s.passthrough()) fail("bits= has no meaning with calibrate=: nothing is coded while it collects");
    for (const char* key : {"window", "pool", "small", "profile", "top"}) {
      if (given.count(key))
        fail(std::string(key) + "= has no meaning with calibrate=: nothing is coded while it collects");
    }
  }
  if (s.window.last == 0 && !given.count("pool")) s.window.pool = 0;
  if (s.window.last + s.window.pool == 0) s.window.spare = 0;
  if (s.top == 0) {
    for (const char* key : {"store", "path", "tail", "policy"}) {
      if (given.count(key)) fail(std::string(key) + "= has no meaning without top=");
    }
  }
  if (s.top > 0 && s.passthrough()) fail("top=" + std::to_string(s.top) + " has no meaning with bits=16: all is exact");
  const bool in_file = s.store == Settings::Store::file;
  if (in_file && s.path.empty()) fail("store=file needs path=DIR, a directory on a disk with room");
  if (!in_file && !s.path.empty()) fail("path= has no meaning without store=file");
  return s;
}

}  // namespace

Settings Settings::parse(const std::string& text, const std::string& where) {
  try {
    return parse_items(text);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(where + ": " + error.what());
  }
}

Settings Settings::from_environment() {
  const char* text = std::getenv("THIMBLE_KV");
  return parse(text ? text : "");
}

std::string Settings::to_string() const {
  if (calibrates()) {
    std::string text = "calibrate=" + calibrate.path + ",tokens=" + std::to_string(calibrate.tokens);
    if (calibrate.context > 0) text += ",context=" + std::to_string(calibrate.context);
    for (size_t i = 0; i < calibrate.rates.size(); i++) text += (i ? "+" : ",rates=") + number(calibrate.rates[i]);
    text += calibrate.even ? ",even=yes" : ",even=no";
    return text + (device.empty() ? "" : ",device=" + device);
  }
  std::string text = "bits=" + number(key_bits);
  if (value_bits != key_bits) text += "/" + number(value_bits);
  text += ",window=" + std::to_string(window.last) + ",pool=" + std::to_string(window.pool);
  text += ",small=" + std::to_string(small_cells);
  if (!profile.empty()) text += ",profile=" + profile;
  if (!device.empty()) text += ",device=" + device;
  if (top > 0) {
    text += ",top=" + std::to_string(top) + ",store=" + kStores.begin()[int(store)];
    if (store == Store::file) text += ",path=" + path;
    text += std::string(",tail=") + (drop_tail ? "drop" : "quantized") + ",policy=" + kPolicies.begin()[int(policy)];
  }
  return text;
}

uint64_t Settings::hash() const {
  uint64_t h = 0xcbf29ce484222325;  // FNV-1a
  for (char c : number(key_bits) + "/" + number(value_bits)) h = (h ^ uint8_t(c)) * 0x100000001b3;
  return h;
}

}  // namespace thimble
