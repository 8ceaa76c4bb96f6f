#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace modeltorch {

/// JSON types that a key may have.
enum class KeyType : uint8_t { kBool, kInteger, kNumber, kString, kArray, kObject };

/// What happens to a key today.
enum class KeyPolicy : uint8_t {
  kRequired,      ///< must be there
  kOptional,      ///< read if there
  kMeaningless,   ///< checked for its type, then ignored: it cannot change a result
  kOnly,          ///< refused unless it has the one value that is built
  kRequiredOnly,  ///< must be there, and as kOnly
  kAlias,         ///< another spelling of the key that `only` names
};

/// One line of a parameter table.
struct KeyRule {
  std::string_view key;
  KeyType type;
  KeyPolicy policy;
  const char* only = nullptr;  ///< the accepted value as JSON, or the key that an alias stands for
  const char* asks = "";       ///< what any other value asks for, for the message
};

/// The longest JSON text that the contract allows (docs/contract.md, "Parameters").
inline constexpr size_t kMaxJsonLength = 200000;

/// Parses `text` into an object. Throws Error for empty, too long, invalid or non-object text.
nlohmann::json parse_object(const std::string& text, std::string_view what);

/// A parsed parameter object that was checked against a table.
class Parameters {
 public:
  /// Throws Error naming key, expected and given. Keys that the table does not know are told in one warning.
  Parameters(const std::string& text, std::span<const KeyRule> rules);

  bool flag(const char* key, bool otherwise) const { return json_.value(key, otherwise); }
  int64_t integer(const char* key, int64_t otherwise) const { return json_.value(key, otherwise); }
  double number(const char* key, double otherwise) const { return json_.value(key, otherwise); }
  std::string text(const char* key, const char* otherwise) const { return json_.value(key, otherwise); }
  bool has(const char* key) const { return json_.contains(key); }
  const nlohmann::json& at(const char* key) const { return json_.at(key); }

  /// A required whole number of at least 1.
  int64_t positive(const char* key) const;

  /// The table [rows][columns] of whole numbers or booleans under `key`; empty if the key is missing or [].
  std::vector<std::vector<int64_t>> table(const char* key, int64_t rows, int64_t columns) const;

 private:
  nlohmann::json json_;
};

}  // namespace modeltorch
