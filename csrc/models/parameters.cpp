#include "models/parameters.h"

#include <algorithm>

#include "core/check.h"
#include "core/warn.h"

namespace modeltorch {
namespace {

using nlohmann::json;

constexpr int kMaxJsonDepth = 32;  // mapping, the deepest key, has 3
constexpr const char* kTypeNames[] = {"a boolean", "a whole number", "a number",
                                      "a string",  "an array",       "an object"};

// Whole numbers beyond the range of int64_t are kept unsigned by the parser.
bool is_int64(const json& value) {
  return value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX);
}

bool has_type(const json& value, KeyType type) {
  switch (type) {
    case KeyType::kBool:
      return value.is_boolean();
    case KeyType::kInteger:
      return is_int64(value);
    case KeyType::kNumber:
      return value.is_number();
    case KeyType::kString:
      return value.is_string();
    case KeyType::kArray:
      return value.is_array();
    default:
      return value.is_object();
  }
}

// A value for a message: never longer than a line.
std::string shown(const json& value) {
  constexpr size_t kLongest = 60;
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

// Counts brackets outside of strings: the parser alone would find out only by being there.
bool nests_too_deep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t at = 0; at < text.size(); ++at) {
    const char letter = text[at];
    if (in_string) {
      if (letter == '\\') ++at;
      in_string = letter != '"';
    } else if (letter == '[' || letter == '{') {
      if (++depth > kMaxJsonDepth) return true;
    } else if (letter == ']' || letter == '}') {
      --depth;
    } else {
      in_string = letter == '"';
    }
  }
  return false;
}

void resolve_alias(json& object, const KeyRule& rule) {
  const auto given = object.find(rule.key);
  if (rule.policy != KeyPolicy::kAlias || given == object.end()) return;
  const json value = *given;
  const auto target = object.find(rule.only);
  if (target == object.end()) {
    object[rule.only] = value;
    return;
  }
  check(*target == value, "parameters ", rule.key, " and ", rule.only, " mean the same, got ", shown(value),
        " and ", shown(*target));
}

void apply_rule(const json& object, const KeyRule& rule) {
  const auto found = object.find(rule.key);
  if (found == object.end()) {
    const bool required = rule.policy == KeyPolicy::kRequired || rule.policy == KeyPolicy::kRequiredOnly;
    check(!required, "parameter ", rule.key, " is required (", kTypeNames[static_cast<int>(rule.type)],
          ") and missing");
    return;
  }
  check(has_type(*found, rule.type), "parameter ", rule.key, " must be ",
        kTypeNames[static_cast<int>(rule.type)], ", got ", shown(*found));
  const bool limited = rule.policy == KeyPolicy::kOnly || rule.policy == KeyPolicy::kRequiredOnly;
  if (limited && *found != json::parse(rule.only)) {
    fail(ErrorKind::kNotImplemented, "parameter ", rule.key, " = ", shown(*found), " asks for ", rule.asks,
         ", which is not built; only ", rule.only, " is");
  }
}

void warn_of_unknown(const json& object, std::span<const KeyRule> rules) {
  std::string unknown;
  for (const auto& item : object.items()) {
    const bool known =
        std::any_of(rules.begin(), rules.end(), [&](const KeyRule& rule) { return rule.key == item.key(); });
    if (!known) unknown += (unknown.empty() ? "" : ", ") + item.key();
  }
  if (!unknown.empty()) warn("set_param ignores unknown parameters: " + unknown);
}

}  // namespace

json parse_object(const std::string& text, std::string_view what) {
  check(!text.empty(), what, " must be a JSON object, got an empty string");
  check(text.size() <= kMaxJsonLength, what, " must be at most ", kMaxJsonLength, " characters long, got ",
        text.size());
  check(!nests_too_deep(text), what, " must not nest deeper than ", kMaxJsonDepth, " levels");
  json object = json::parse(text, nullptr, false);
  if (object.is_discarded())
    fail(ErrorKind::kValue, what, " must be a JSON object, got invalid JSON: ", text.substr(0, 60));
  if (!object.is_object()) fail(ErrorKind::kValue, what, " must be a JSON object, got ", shown(object));
  return object;
}

Parameters::Parameters(const std::string& text, std::span<const KeyRule> rules)
    : json_(parse_object(text, "the parameter of set_param")) {
  for (const KeyRule& rule : rules) resolve_alias(json_, rule);
  for (const KeyRule& rule : rules) apply_rule(json_, rule);
  warn_of_unknown(json_, rules);
}

int64_t Parameters::positive(const char* key) const {
  const int64_t value = json_.at(key).get<int64_t>();
  check(value > 0, "parameter ", key, " must be at least 1, got ", value);
  return value;
}

std::vector<std::vector<int64_t>> Parameters::table(const char* key, int64_t rows, int64_t columns) const {
  std::vector<std::vector<int64_t>> numbers;
  const auto found = json_.find(key);
  if (found == json_.end() || found->empty()) return numbers;
  check(static_cast<int64_t>(found->size()) == rows, "parameter ", key, " must have ", rows,
        " rows (one a layer), got ", found->size());
  for (const json& row : *found) {
    check(row.is_array() && static_cast<int64_t>(row.size()) == columns, "parameter ", key,
          " must have rows of ", columns, " entries, got ", shown(row));
    std::vector<int64_t>& line = numbers.emplace_back();
    for (const json& entry : row) {
      check(is_int64(entry) || entry.is_boolean(), "parameter ", key,
            " must hold whole numbers or booleans, got ", shown(entry));
      line.push_back(entry.is_boolean() ? static_cast<int64_t>(entry.get<bool>()) : entry.get<int64_t>());
    }
  }
  return numbers;
}

}  // namespace modeltorch
