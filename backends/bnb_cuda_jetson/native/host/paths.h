// Several kernels for one op: which of them take a product, and which one is chosen where the caller names none.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace bnb {

template <class Product>
struct Path {
  const char* name;
  bool (*fits)(const Product&);      // whether it can
  bool (*is_worth)(const Product&);  // whether it is chosen, where it fits and none before it is
};

// Paths of an op, in the order in which they are looked at. The last takes every product.
template <class Product, std::size_t kCount>
struct Paths {
  const char* op;
  const Path<Product>* paths[kCount];

  // The path of this name, or for "automatic" the one to choose. Throws std::invalid_argument where it does not take the product.
  const Path<Product>& named(const char* name, const Product& product) const {
    const bool automatic = !std::strcmp(name, "automatic");
    for (const Path<Product>* path : paths) {
      if (path->fits(product) && (automatic ? path->is_worth(product) : !std::strcmp(name, path->name))) return *path;
    }
    throw std::invalid_argument(std::string(op) + ": no path '" + name + "' takes this product; " + op + "_paths names those that do");
  }

  // The names of those that take a product; first the one to choose.
  std::vector<std::string> names(const Product& product) const {
    std::vector<std::string> names{named("automatic", product).name};
    for (const Path<Product>* path : paths) {
      if (path->fits(product) && path->name != names[0]) names.push_back(path->name);
    }
    return names;
  }
};

}  // namespace bnb
