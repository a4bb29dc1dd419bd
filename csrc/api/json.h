#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace halfstep::api {

/// A JSON object or array as it is written. Keys are plain; values are escaped.
class Json {
 public:
  explicit Json(char open) : text_(1, open), close_(open == '{' ? '}' : ']') {}

  Json& raw(const std::string& value) {
    if (text_.size() > 1) text_ += ',';
    text_ += value;
    return *this;
  }
  Json& raw(const std::string& key, const std::string& value) {
    return raw('"' + key + "\":" + value);
  }
  template <class T>
  Json& add(const T& value) {
    return raw(of(value));
  }
  template <class T>
  Json& add(const std::string& key, const T& value) {
    return raw(key, of(value));
  }
  std::string end() const { return text_ + close_; }

  static std::string of(int64_t value) { return std::to_string(value); }
  static std::string of(double value) {  // JSON knows no inf and no NaN
    if (!std::isfinite(value))
      return std::isnan(value) ? "\"nan\"" : value > 0 ? "\"inf\"" : "\"-inf\"";
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", value);
    return text;
  }
  static std::string of(const std::string& value) {
    std::string out = "\"";
    for (const char c : value) {
      if (c == '"' || c == '\\') out += '\\';
      if (uint8_t(c) < 0x20) {
        char code[8];
        std::snprintf(code, sizeof code, "\\u%04x", unsigned(uint8_t(c)));
        out += code;
      } else {
        out += c;
      }
    }
    return out + '"';
  }

 private:
  std::string text_;
  char close_;
};

}  // namespace halfstep::api
