// Without arguments: the names of the checks. With a name: runs that check; 1 and a text on failure.
#include "check.h"

int main(int count, char** arguments) {
  for (const auto& [name, body] : check::list()) {
    if (count < 2) {
      std::cout << name << "\n";
    } else if (name == arguments[1]) {
      try {
        body();
        return 0;
      } catch (const std::exception& error) {
        std::cerr << name << ": " << error.what() << "\n";
        return 1;
      }
    }
  }
  if (count < 2) return 0;
  std::cerr << "no check named " << arguments[1] << "\n";
  return 2;
}
