// fastsam._C.spec(): spec.h's numbers by fastsam/spec.py's names, for the test that compares them.
#include "spec.h"

#include <cstddef>
#include <utility>

#include "python.h"

namespace fastsam {
namespace {

constexpr std::pair<const char*, int64_t> kNumbers[] = {
    {"Row.PARAM", kParam},
    {"Row.GRAD", kGrad},
    {"Row.BACKUP", kBackup},
    {"Row.STATE", kState0},
    {"Row.STATE_1", kState1},
    {"Row.STATE_2", kState2},
    {"Row.MASTER", kMaster},
    {"Row.FIRST_GRAD", kFirstGrad},
    {"Row.DIRECTION", kDirection},
    {"Row.METHOD_STATE", kMethodState},
    {"Row.STEP", kStep},
    {"ROWS", kRows},
    {"STATE_SLOTS", kStateSlots},
    {"NONE", kNone},
    {"PERTURBATION", kPerturbation},
    {"Update.NONE", static_cast<int64_t>(Update::kNone)},
    {"Update.SGD", static_cast<int64_t>(Update::kSgd)},
    {"Update.ADAM", static_cast<int64_t>(Update::kAdam)},
    {"Map.IDENTITY", static_cast<int64_t>(Map::kIdentity)},
    {"Map.POWER", static_cast<int64_t>(Map::kPower)},
    {"Map.ADAPTIVE", static_cast<int64_t>(Map::kAdaptive)},
    {"Draw.ASCENT", kAscentDraw},
    {"Draw.WEIGHT", kWeightDraw},
    {"Draw.STATE", kStateDraw},
    {"Draw.METHOD_STATE", kMethodStateDraw},
    {"RANDOM_WORDS", kRandomWords},
// The place of a field in a row of options or coefficients.
#define FASTSAM_FIELD(name, type, field) {name, offsetof(type, field) / sizeof(double)}
    FASTSAM_FIELD("AscentOptions.rho", AscentOptions, rho),
    FASTSAM_FIELD("AscentOptions.adaptive", AscentOptions, adaptive),
    FASTSAM_FIELD("AscentOptions.maximize", AscentOptions, maximize),
    FASTSAM_FIELD("AscentOptions.rounding_seed", AscentOptions, rounding_seed),
    FASTSAM_FIELD("SGDOptions.lr", SgdOptions, lr),
    FASTSAM_FIELD("SGDOptions.momentum", SgdOptions, momentum),
    FASTSAM_FIELD("SGDOptions.dampening", SgdOptions, dampening),
    FASTSAM_FIELD("SGDOptions.weight_decay", SgdOptions, weight_decay),
    FASTSAM_FIELD("SGDOptions.nesterov", SgdOptions, nesterov),
    FASTSAM_FIELD("SGDOptions.maximize", SgdOptions, maximize),
    FASTSAM_FIELD("SGDOptions.rounding_seed", SgdOptions, rounding_seed),
    FASTSAM_FIELD("AdamOptions.lr", AdamOptions, lr),
    FASTSAM_FIELD("AdamOptions.beta1", AdamOptions, beta1),
    FASTSAM_FIELD("AdamOptions.beta2", AdamOptions, beta2),
    FASTSAM_FIELD("AdamOptions.eps", AdamOptions, eps),
    FASTSAM_FIELD("AdamOptions.weight_decay", AdamOptions, weight_decay),
    FASTSAM_FIELD("AdamOptions.decoupled", AdamOptions, decoupled),
    FASTSAM_FIELD("AdamOptions.amsgrad", AdamOptions, amsgrad),
    FASTSAM_FIELD("AdamOptions.maximize", AdamOptions, maximize),
    FASTSAM_FIELD("AdamOptions.rounding_seed", AdamOptions, rounding_seed),
    FASTSAM_FIELD("AscentCoefficients.A", AscentCoefficients, a),
    FASTSAM_FIELD("AscentCoefficients.B", AscentCoefficients, b),
    FASTSAM_FIELD("AscentCoefficients.SCALE", AscentCoefficients, scale),
    FASTSAM_FIELD("AscentCoefficients.TERM", AscentCoefficients, term),
    FASTSAM_FIELD("DescentCoefficients.A", DescentCoefficients, a),
    FASTSAM_FIELD("DescentCoefficients.B", DescentCoefficients, b),
    FASTSAM_FIELD("DescentCoefficients.KEEP_X", DescentCoefficients, keep_x),
    FASTSAM_FIELD("DescentCoefficients.KEEP_FIRST", DescentCoefficients, keep_first),
    FASTSAM_FIELD("DescentCoefficients.KEEP_STATE", DescentCoefficients, keep_state),
    FASTSAM_FIELD("DescentCoefficients.DECOUPLED_X", DescentCoefficients, decoupled_x),
    FASTSAM_FIELD("DescentCoefficients.DECOUPLED_Y", DescentCoefficients, decoupled_y),
};

}  // namespace

PyObject* spec(PyObject*, PyObject*) {
  PyObject* numbers = PyDict_New();
  for (const auto& [name, number] : kNumbers) {
    if (numbers == nullptr) return nullptr;
    PyObject* value = PyLong_FromLongLong(number);
    if (value == nullptr || PyDict_SetItemString(numbers, name, value) != 0) Py_CLEAR(numbers);
    Py_XDECREF(value);
  }
  return numbers;
}

}  // namespace fastsam
