package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const testKey = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"

func parse(env map[string]string, files map[string]string) (settings, error) {
	return parseSettings(func(k string) string { return env[k] }, func(path string) ([]byte, error) {
		if text, ok := files[path]; ok {
			return []byte(text), nil
		}
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	})
}

func TestSettings(t *testing.T) {
	key := make([]byte, keySize)
	for i := range key {
		key[i] = byte(i)
	}
	plain := settings{port: 4796, dataPort: 4797, level: slog.LevelInfo, iptables: "auto", checksum: "auto", program: "auto", flows: "on", scope: "local",
		wireguard: "auto", tunnelPort: 4798, keyAge: 720 * time.Hour}
	with := func(change func(*settings)) settings { s := plain; change(&s); return s }
	for _, c := range []struct {
		name  string
		env   map[string]string
		files map[string]string
		want  settings
	}{
		{"nothing", nil, nil, plain},
		{"empty values", map[string]string{"WEFT_PORT": " ", "WEFT_JOIN": "", "WEFT_METRICS": ""}, nil, plain},
		{"join", map[string]string{"WEFT_JOIN": "10.0.0.1, 10.0.0.2:99\thost.example,fd00::1 [fd00::2]:7 [fd00::3]"}, nil, with(func(s *settings) {
			s.join = []string{"10.0.0.1:4796", "10.0.0.2:99", "host.example:4796", "[fd00::1]:4796", "[fd00::2]:7", "[fd00::3]:4796"}
		})},
		{"join takes the port that is set", map[string]string{"WEFT_JOIN": "a", "WEFT_PORT": "5000"}, nil, with(func(s *settings) { s.join, s.port = []string{"a:5000"}, 5000 })},
		{"hex key", map[string]string{"WEFT_KEY": testKey}, nil, with(func(s *settings) { s.key = key })},
		{"base64 key", map[string]string{"WEFT_KEY": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}, nil, with(func(s *settings) { s.key = key })},
		{"key file", map[string]string{"WEFT_KEY_FILE": "/k"}, map[string]string{"/k": testKey + "\n"}, with(func(s *settings) { s.key = key })},
		{"address", map[string]string{"WEFT_ADDRESS": "192.0.2.1"}, nil, with(func(s *settings) { s.address = netip.MustParseAddr("192.0.2.1") })},
		{"mapped address", map[string]string{"WEFT_ADDRESS": "::ffff:192.0.2.1"}, nil, with(func(s *settings) { s.address = netip.MustParseAddr("192.0.2.1") })},
		{"words", map[string]string{"WEFT_IPTABLES": "Legacy", "WEFT_CHECKSUM_OFFLOAD": "off", "WEFT_LOG_LEVEL": "DEBUG", "WEFT_METRICS": ":9797"}, nil,
			with(func(s *settings) {
				s.iptables, s.checksum, s.level, s.metrics = "legacy", "off", slog.LevelDebug, ":9797"
			})},
		{"public address", map[string]string{"WEFT_PUBLIC_ADDRESS": "198.51.100.7"}, nil, with(func(s *settings) { s.public = netip.MustParseAddr("198.51.100.7") })},
		{"wireguard", map[string]string{"WEFT_WIREGUARD": "Kernel", "WEFT_WIREGUARD_PORT": "51820", "WEFT_WIREGUARD_KEY_AGE": "0"}, nil, with(func(s *settings) {
			s.wireguard, s.tunnelPort, s.keyAge = "kernel", 51820, 0
		})},
		{"scope", map[string]string{"WEFT_SCOPE": "GLOBAL"}, nil, with(func(s *settings) { s.scope = "global" })},
		{"subnets", map[string]string{"WEFT_SUBNETS": "10.96.0.0/12,fd00:77::/48"}, nil, with(func(s *settings) {
			s.subnets = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:77::/48")}
		})},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parse(c.env, c.files)
			if err != nil {
				t.Fatal(err)
			}
			got.keyText, got.keyFile = "", ""
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(settings{}), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestWrongSettingsNameSettingValueAndRemedy(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{"WEFT_JOIN", "10.0.0.1:0", "host:port"},
		{"WEFT_JOIN", "http://a", "host"},
		{"WEFT_JOIN", "a:b:c", "is not a host"},
		{"WEFT_KEY", "secret", "openssl rand -hex 32"},
		{"WEFT_KEY_FILE", "/nowhere", "/nowhere"},
		{"WEFT_ADDRESS", "eth0", "192.0.2.10"},
		{"WEFT_ADDRESS", "127.0.0.1", "by which other hosts reach"},
		{"WEFT_ADDRESS", "0.0.0.0", "by which other hosts reach"},
		{"WEFT_PORT", "0", "1 to 65535"},
		{"WEFT_PORT", "65536", "1 to 65535"},
		{"WEFT_PORT", "4797", "choose two ports"},
		{"WEFT_DATA_PORT", "-1", "1 to 65535"},
		{"WEFT_PUBLIC_ADDRESS", "10.0.0.1", "is private"},
		{"WEFT_PUBLIC_ADDRESS", "100.64.0.1", "is private"},
		{"WEFT_PUBLIC_ADDRESS", "fd00::1", "is private"},
		{"WEFT_PUBLIC_ADDRESS", "gateway", "192.0.2.10"},
		{"WEFT_WIREGUARD", "yes", "use auto, kernel or userspace"},
		{"WEFT_WIREGUARD_PORT", "65535", "port after it"},
		{"WEFT_WIREGUARD_PORT", "4796", "clash"},
		{"WEFT_WIREGUARD_PORT", "0", "1 to 65535"},
		{"WEFT_WIREGUARD_KEY_AGE", "daily", "720h"},
		{"WEFT_WIREGUARD_KEY_AGE", "1s", "less than 1h"},
		{"WEFT_LOG_LEVEL", "loud", "use debug, info, warn or error"},
		{"WEFT_METRICS", "9797", "127.0.0.1:9797"},
		{"WEFT_METRICS", "example.com:9797", "address of this host"},
		{"WEFT_IPTABLES", "yes", "use auto, nft or legacy"},
		{"WEFT_CHECKSUM_OFFLOAD", "1", "use auto, on or off"},
		{"WEFT_SUBNETS", "10.0.0.0", "10.96.0.0/12"},
		{"WEFT_SUBNETS", "10.0.0.1/8", "write 10.0.0.0/8"},
		{"WEFT_SUBNETS", "0.0.0.0/0", "private range"},
		{"WEFT_SUBNETS", "10.0.0.0/8 10.1.0.0/16", "overlap"},
		{"WEFT_SUBNETS", "127.0.0.0/8", "private range"},
		{"WEFT_SUBNETS", "120.0.0.0/5", "127.0.0.0/8"},
		{"WEFT_SUBNETS", "224.0.0.0/8", "224.0.0.0/4"},
		{"WEFT_SUBNETS", "169.254.0.0/16", "private range"},
		{"WEFT_SUBNETS", "fe80::/64", "fe80::/10"},
		{"WEFT_SUBNETS", "fd00::/16 ff02::/16", "ff00::/8"},
	} {
		t.Run(c.name+"="+c.value, func(t *testing.T) {
			_, err := parse(map[string]string{c.name: c.value}, nil)
			if err == nil {
				t.Fatal("accepted")
			}
			text := err.Error()
			if !strings.Contains(text, c.name) || !strings.Contains(text, c.want) || !strings.Contains(text, "docker plugin set weft") {
				t.Errorf("error is %q", text)
			}
			if c.name != "WEFT_KEY" && c.name != "WEFT_PORT" && !strings.Contains(text, c.value) {
				t.Errorf("error %q does not name the value", text)
			}
			if c.name == "WEFT_KEY" && strings.Contains(text, c.value) {
				t.Errorf("error %q gives the key away", text)
			}
		})
	}
	if _, err := parse(map[string]string{"WEFT_KEY": testKey, "WEFT_KEY_FILE": "/k"}, map[string]string{"/k": testKey}); err == nil {
		t.Error("two keys are accepted")
	}
	_, err := parse(map[string]string{"WEFT_PORT": "x", "WEFT_IPTABLES": "y"}, nil)
	if err == nil || !strings.Contains(err.Error(), "WEFT_PORT") || !strings.Contains(err.Error(), "WEFT_IPTABLES") {
		t.Errorf("not all that is wrong is told: %v", err)
	}
}

var update = flag.Bool("update", false, "write README's table and the golden files")

// The manifest and the table must name the same settings with the same defaults.
func TestManifestHasTheSettings(t *testing.T) {
	raw, err := os.ReadFile("../config.json")
	if err != nil {
		t.Fatal(err)
	}
	var manifest struct {
		Env []struct {
			Name, Value string
			Settable    []string
		}
	}
	if err := json.Unmarshal(raw, &manifest); err != nil {
		t.Fatal(err)
	}
	var inManifest, inTable []string
	for _, e := range manifest.Env {
		inManifest = append(inManifest, e.Name+"="+e.Value)
		if !slices.Contains(e.Settable, "value") {
			t.Errorf("%s cannot be set", e.Name)
		}
	}
	for _, row := range settingTable() {
		// The defaults of words stand in the manifest too, so that inspect shows them.
		inTable = append(inTable, row.name+"="+row.def)
	}
	if diff := cmp.Diff(inTable, inManifest); diff != "" {
		t.Errorf("-settings.go +config.json\n%s", diff)
	}
}

func TestReadmeHasTheSettings(t *testing.T) {
	const path = "../README.md"
	const begin, end = "<!-- settings: printed from plugin/settings.go by go test ./plugin -update -->\n", "<!-- end settings -->"
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		t.Fatal("README.md is missing")
	}
	head, rest, ok := bytes.Cut(raw, []byte(begin))
	old, tail, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		t.Fatalf("README.md lacks the lines %q and %q", begin, end)
	}
	var table bytes.Buffer
	printSettings(&table)
	if bytes.Equal(old, table.Bytes()) {
		return
	}
	if !*update {
		t.Fatalf("README.md's table of settings is old; run go test ./plugin -update\n%s", cmp.Diff(string(old), table.String()))
	}
	if err := os.WriteFile(path, slices.Concat(head, []byte(begin), table.Bytes(), []byte(end), tail), 0o644); err != nil {
		t.Fatal(err)
	}
}
