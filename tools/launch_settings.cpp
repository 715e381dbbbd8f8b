#include "launch_settings.h"

#include <algorithm>
#include <stdexcept>

#include "engine/settings.h"

namespace thimble {
namespace {

struct Item {
  std::string key, value, typed;  // typed: as the user wrote it
};

std::vector<Item> items_of(const std::string& text) {
  std::vector<Item> items;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    const size_t equals = std::min(item.find('='), item.size());
    items.push_back({item.substr(0, equals), equals < item.size() ? item.substr(equals + 1) : "", item});
    begin = end + 1;
  }
  return items;
}

// Keys whose value cannot be checked alone, since whether they are allowed depends on other keys.
bool needs_others(const std::string& key) {
  return key == "path" || key == "policy" || key == "store" || key == "tail" || key == "tokens" || key == "context" ||
         key == "rates" || key == "even";
}

std::vector<Item> typed_items(const LaunchFlags& flags) {
  std::vector<Item> items;
  const auto add = [&](const std::string& key, const std::string& value, const std::string& typed) {
    for (const Item& item : items) {
      if (item.key != key) continue;
      std::string why = typed;
      why.append(": ").append(item.typed).append(" says ").append(key).append(" already");
      throw std::invalid_argument(why);
    }
    if (!needs_others(key)) Settings::parse(key + "=" + value, typed);
    items.push_back({key, value, typed});
  };
  if (!flags.kv.empty()) {
    const size_t plus = flags.kv.find('+');  // 2+64: 2 bits and the 64 best cells exactly
    const std::string typed = "--kv " + flags.kv, bits = flags.kv.substr(0, plus);
    Settings::parse("bits=" + bits, typed);
    items.push_back({"bits", bits, typed});
    if (plus != std::string::npos) add("top", flags.kv.substr(plus + 1), typed);
  }
  if (!flags.window.empty()) add("window", flags.window, "--window " + flags.window);
  if (!flags.store.empty()) {
    add("store", "file", "--store " + flags.store);
    items.push_back({"path", flags.store, "--store " + flags.store});
  }
  if (!flags.profile.empty()) add("profile", flags.profile, "--profile " + flags.profile);
  if (!flags.policy.empty()) add("policy", flags.policy, "--policy " + flags.policy);
  for (const std::string& text : flags.set) {
    if (text.find('=') == std::string::npos) throw std::invalid_argument("--set " + text + " is not key=value");
    for (const Item& item : items_of(text)) add(item.key, item.value, "--set " + text);
  }
  return items;
}

}  // namespace

bool LaunchSettings::has(const std::string& key) const {
  const auto items = items_of(text);
  return std::any_of(items.begin(), items.end(), [&](const Item& item) { return item.key == key; });
}

LaunchSettings merge_settings(const LaunchFlags& flags, const std::string& environment) {
  Settings::parse(environment);
  LaunchSettings merged;
  std::vector<Item> items = items_of(environment);
  std::string typed;
  for (const Item& item : typed_items(flags)) {
    if (typed.find(item.typed) == std::string::npos) typed += (typed.empty() ? "" : " ") + item.typed;
    const auto same =
        std::find_if(items.begin(), items.end(), [&](const Item& other) { return other.key == item.key; });
    if (same == items.end()) {
      items.push_back(item);
      continue;
    }
    if (same->value != item.value) {
      merged.notes.push_back(item.typed + " takes the place of " + same->typed + " in THIMBLE_KV");
    }
    *same = item;
  }
  for (const Item& item : items) merged.text += (merged.text.empty() ? "" : ",") + item.key + "=" + item.value;
  Settings::parse(merged.text, typed.empty() ? "THIMBLE_KV" : typed);
  return merged;
}

}  // namespace thimble
